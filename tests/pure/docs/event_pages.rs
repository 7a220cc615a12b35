//! The reference page of the `--json` stream.

use super::key_pages::GENERATED;
use oven::cli::results;
use oven::report::events;
use oven::report::events::{EventField, EventSpec, FORMAT, JsonType};
use std::fmt::Write;

pub fn page() -> String {
    let mut text = format!(
        "{GENERATED}\n# JSON events\n\nWith `--json`, every verb prints a stream of events on standard output: a JSON \
         object on each line. The last one is the result, also after a mistake on the command line or a failure. \
         Standard error has nothing that a program needs.\n\nEach object has a field `event`, which says what it is, and \
         a field `format`, which is {FORMAT}. The number changes when a field is removed or changes its meaning. New \
         fields and new events may come without a new number, so a reader ignores what it does not know. \
         [`schema/events.schema.json`](../../schema/events.schema.json) is the schema of this version of oven. In every \
         text, `***` stands in place of secrets.\n\n```json\n\
         {{\"event\":\"step\",\"format\":1,\"at_ms\":412,\"image\":\"web\",\"phase\":\"mount\",\"what\":\"mounting\"}}\n\
         {{\"event\":\"result\",\"format\":1,\"at_ms\":61234,\"exit_code\":0,\"images\":[…]}}\n```\n\n## Fields of every \
         event\n"
    );
    table(&mut text, events::COMMON);
    text.push_str("\n## Events\n");
    events::EVENTS.iter().for_each(|event| one(&mut text, event));
    text.push_str(
        "\n## Results\n\nThe field `event` of a result is `result`. Every result has these fields, and those of its verb.\n",
    );
    table(&mut text, results::COMMON);
    results::RESULTS.iter().for_each(|result| one(&mut text, result));
    text
}

fn one(text: &mut String, event: &EventSpec) {
    _ = write!(text, "\n### `{}`\n\n{}\n", event.name, event.doc);
    table(text, event.fields);
}

fn table(text: &mut String, fields: &[EventField]) {
    if fields.is_empty() {
        return;
    }
    text.push_str("\n| field | type | meaning |\n|---|---|---|\n");
    rows(text, "", fields);
}

fn rows(text: &mut String, path: &str, fields: &[EventField]) {
    for field in fields {
        let maybe = if field.always { "" } else { " (optional)" };
        let name = format!("{path}{}", field.name);
        _ = writeln!(text, "| `{name}` | {}{maybe} | {} |", type_of(&field.value), field.doc);
        if let Some((suffix, fields)) = nested(&field.value) {
            rows(text, &format!("{name}{suffix}."), fields);
        }
    }
}

fn nested(value: &JsonType) -> Option<(&'static str, &'static [EventField])> {
    match value {
        JsonType::Object(fields) => Some(("", fields)),
        JsonType::List(JsonType::Object(fields)) => Some(("[]", fields)),
        JsonType::Either(types) => types.iter().find_map(nested),
        _ => None,
    }
}

fn type_of(value: &JsonType) -> String {
    match value {
        JsonType::Text => "text".into(),
        JsonType::Words(words) => words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", "),
        JsonType::Integer => "integer".into(),
        JsonType::Boolean => "boolean".into(),
        JsonType::List(JsonType::Text) => "array of texts".into(),
        JsonType::List(_) => "array of objects".into(),
        JsonType::Map(JsonType::List(_)) => "object of arrays of texts".into(),
        JsonType::Map(value) => format!("object of {}s", type_of(value)),
        JsonType::Object(_) => "object".into(),
        JsonType::OrNull(value) => format!("{} or null", type_of(value)),
        JsonType::Either(types) => types.iter().map(type_of).collect::<Vec<_>>().join(", or "),
        JsonType::Anything => "object".into(),
    }
}
