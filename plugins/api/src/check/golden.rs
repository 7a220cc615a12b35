//! The form in which golden plans are stored.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// A part of the contract as JSON, without the fields that have their defaults: a field that is added to the contract
/// changes only those golden plans that use it.
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

/// Lists each field after the fields inside of it: the JSON pointer of its object, and its name.
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
