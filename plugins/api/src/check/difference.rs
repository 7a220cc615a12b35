//! Where two documents differ, in words.

use serde_json::Value;

/// The first place where two documents differ: `plan.steps[0].why is "b", and was "a"`.
pub fn difference(before: &Value, after: &Value) -> Option<String> {
    differ(before, after, String::new())
}

fn differ(before: &Value, after: &Value, at: String) -> Option<String> {
    let place = if at.is_empty() { "it" } else { at.trim_start_matches('.') };
    match (before, after) {
        (Value::Object(before), Value::Object(after)) => {
            let gone = before.iter().find(|(key, _)| !after.contains_key(*key));
            if let Some((key, value)) = gone {
                return Some(format!("{place} has no `{key}`, and had {}", short(value)));
            }
            after.iter().find_map(|(key, value)| match before.get(key) {
                None => Some(format!("{place} has `{key}`: {}, and had none", short(value))),
                Some(old) => differ(old, value, format!("{at}.{key}")),
            })
        }
        (Value::Array(before), Value::Array(after)) => {
            let pairs = before.iter().zip(after).enumerate();
            pairs.into_iter().find_map(|(i, (old, new))| differ(old, new, format!("{at}[{i}]"))).or_else(
                || {
                    let (was, is) = (before.len(), after.len());
                    (was != is).then(|| format!("{place} has {is} elements, and had {was}"))
                },
            )
        }
        _ => (before != after).then(|| format!("{place} is {}, and was {}", short(after), short(before))),
    }
}

/// A value, as long as a line can be.
fn short(value: &Value) -> String {
    const MAX: usize = 80;
    let text = value.to_string();
    match text.char_indices().nth(MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
