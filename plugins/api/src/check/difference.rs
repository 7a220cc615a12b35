//! Describes where two JSON documents differ.

use serde_json::Value;

/// Describes the first difference between two documents, such as `plan.steps[0].why is "b"; it was "a"`.
pub fn difference(before: &Value, after: &Value) -> Option<String> {
    find_difference(before, after, String::new())
}

fn find_difference(before: &Value, after: &Value, at: String) -> Option<String> {
    let place = if at.is_empty() { "it" } else { at.trim_start_matches('.') };
    match (before, after) {
        (Value::Object(before), Value::Object(after)) => {
            let removed = before.iter().find(|(key, _)| !after.contains_key(*key));
            if let Some((key, value)) = removed {
                return Some(format!("{place} has no `{key}`; it was {}", abbreviate(value)));
            }
            after.iter().find_map(|(key, value)| match before.get(key) {
                None => Some(format!("{place} has a new `{key}`: {}", abbreviate(value))),
                Some(old) => find_difference(old, value, format!("{at}.{key}")),
            })
        }
        (Value::Array(before), Value::Array(after)) => {
            let pairs = before.iter().zip(after).enumerate();
            pairs
                .into_iter()
                .find_map(|(i, (old, new))| find_difference(old, new, format!("{at}[{i}]")))
                .or_else(|| {
                    let (was, is) = (before.len(), after.len());
                    (was != is).then(|| format!("{place} has {is} elements; it had {was}"))
                })
        }
        _ => (before != after)
            .then(|| format!("{place} is {}; it was {}", abbreviate(after), abbreviate(before))),
    }
}

/// A value as JSON, cut off so that it fits on a line.
fn abbreviate(value: &Value) -> String {
    const MAX: usize = 80;
    let text = value.to_string();
    match text.char_indices().nth(MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
