//! The form in which golden plans are stored. A golden plan is a reviewed plan with which the suite compares a new one.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Returns a value of the contract as JSON, without the fields that have their default values. So a new field of the
/// contract changes only the golden plans that use it.
pub fn without_defaults<T>(part: &T) -> Value
where
    T: Serialize + DeserializeOwned + PartialEq,
{
    let mut json = super::value(part);
    let mut fields = Vec::new();
    list_fields(&json, "", &mut fields);
    for (pointer, name) in fields {
        let mut shorter = json.clone();
        if let Some(object) = shorter.pointer_mut(&pointer).and_then(Value::as_object_mut) {
            object.remove(&name);
        }
        if serde_json::from_value::<T>(shorter.clone()).is_ok_and(|without| without == *part) {
            json = shorter;
        }
    }
    json
}

/// Lists all fields. Each entry is the JSON pointer of the object that has the field, and the field's name. A field
/// comes after the fields that it contains.
fn list_fields(json: &Value, pointer: &str, fields: &mut Vec<(String, String)>) {
    match json {
        Value::Object(object) => {
            for (name, value) in object {
                let escaped = name.replace('~', "~0").replace('/', "~1");
                list_fields(value, &format!("{pointer}/{escaped}"), fields);
                fields.push((pointer.to_owned(), name.clone()));
            }
        }
        Value::Array(elements) => {
            for (index, element) in elements.iter().enumerate() {
                list_fields(element, &format!("{pointer}/{index}"), fields);
            }
        }
        _ => {}
    }
}
