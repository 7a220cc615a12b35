//! JSON Schemas from the tables.

use oven::cli::results;
use oven::config::key_table::{
    Condition, DefaultValue, KeyRule, Literal, Section, TextRule, TomlKey, ValueType,
};
use oven::config::project::keys::OVEN_TOML;
use oven::definition::keys::IMAGE_TOML;
use oven::report::events;
use oven::report::events::{EventField, EventSpec, JsonType};
use serde_json::{Map, Value, json};

const DRAFT: &str = "https://json-schema.org/draft/2020-12/schema";

pub fn image_toml() -> Value {
    titled(section(&IMAGE_TOML), "image.toml", "The definition of an image that oven bakes.")
}

pub fn oven_toml() -> Value {
    titled(section(&OVEN_TOML), "oven.toml", "The settings of a project of images that oven bakes.")
}

fn titled(mut schema: Value, title: &str, description: &str) -> Value {
    schema["$schema"] = json!(DRAFT);
    schema["title"] = json!(title);
    schema["description"] = json!(description);
    schema
}

fn section(section: &Section) -> Value {
    let properties: Map<_, _> = section.keys.iter().map(|key| (key.name.to_owned(), property(key))).collect();
    let required: Vec<_> =
        section.keys.iter().filter(|key| key.required.is_some()).map(|key| key.name).collect();
    let mut schema = json!({"type": "object", "additionalProperties": false, "properties": properties});
    if !required.is_empty() {
        schema["required"] = json!(required);
    }
    if !section.rules.is_empty() {
        schema["allOf"] = section.rules.iter().map(rule).collect();
    }
    schema
}

fn property(key: &TomlKey) -> Value {
    let mut schema = value(&key.value);
    schema["description"] = json!(key.doc);
    if let DefaultValue::Is(default) = key.default {
        schema["default"] = literal(default);
    }
    let example: Value = toml::from_str(key.example).expect("an example is TOML");
    if let Some(example) = find(&example, key.name) {
        schema["examples"] = json!([example]);
    }
    schema
}

/// The value of a key, wherever in an example it is.
pub fn find<'v>(value: &'v Value, key: &str) -> Option<&'v Value> {
    match value {
        Value::Object(object) => {
            object.get(key).or_else(|| object.values().find_map(|value| find(value, key)))
        }
        Value::Array(array) => array.iter().find_map(|value| find(value, key)),
        _ => None,
    }
}

fn literal(literal: Literal) -> Value {
    match literal {
        Literal::Boolean(truth) => json!(truth),
        Literal::Integer(number) => json!(number),
        Literal::Text(text) => json!(text),
    }
}

pub fn value(of: &ValueType) -> Value {
    match of {
        ValueType::Boolean => json!({"type": "boolean"}),
        ValueType::Text(rule) => text(rule),
        ValueType::Words(words) => json!({"type": "string", "enum": words}),
        ValueType::Integer { least, most, .. } => {
            json!({"type": "integer", "minimum": least, "maximum": most})
        }
        ValueType::Array(array) => {
            let mut schema = json!({"type": "array", "items": value(&array.element)});
            if let Some(first) = array.first {
                schema["prefixItems"] = json!([value(first)]);
            }
            if array.least > 0 {
                schema["minItems"] = json!(array.least);
            }
            if array.unique {
                schema["uniqueItems"] = json!(true);
            }
            schema
        }
        ValueType::Table(table) => section(table),
        ValueType::Tables(table) => json!({"type": "array", "items": section(table)}),
        ValueType::Map(table) => {
            let mut schema = json!({
                "type": "object",
                "propertyNames": text(&table.names),
                "additionalProperties": value(&table.values),
            });
            if table.least > 0 {
                schema["minProperties"] = json!(table.least);
            }
            if table.most > 0 {
                schema["maxProperties"] = json!(table.most);
            }
            schema
        }
        ValueType::Either(types) => json!({"anyOf": types.iter().map(value).collect::<Vec<_>>()}),
        ValueType::Anything => json!({}),
    }
}

fn text(rule: &TextRule) -> Value {
    let mut schema = json!({"type": "string"});
    if !rule.pattern.is_empty() {
        schema["pattern"] = json!(rule.pattern);
    }
    if rule.most > 0 {
        schema["maxLength"] = json!(rule.most);
    }
    let (starts, words): (Vec<&str>, Vec<&str>) = rule.reserved.iter().partition(|word| word.ends_with('*'));
    let mut never = Vec::new();
    if !rule.never.is_empty() {
        never.push(json!({"pattern": rule.never}));
    }
    if !words.is_empty() {
        never.push(json!({"enum": words}));
    }
    if !starts.is_empty() {
        let starts: Vec<_> = starts.iter().map(|start| start.trim_end_matches('*')).collect();
        never.push(json!({"pattern": format!("^({})", starts.join("|"))}));
    }
    match never.len() {
        0 => {}
        1 => schema["not"] = never.remove(0),
        _ => schema["not"] = json!({"anyOf": never}),
    }
    schema
}

fn rule(rule: &KeyRule) -> Value {
    let is = |key: &str, value: Literal| json!({key: {"const": literal(value)}});
    match rule {
        KeyRule::OneOf(keys) => {
            json!({"oneOf": keys.iter().map(|key| json!({"required": [key]})).collect::<Vec<_>>()})
        }
        KeyRule::Excludes(key, others) => {
            let both: Vec<_> = others.iter().map(|other| json!({"required": [key, other]})).collect();
            json!({"not": {"anyOf": both}})
        }
        KeyRule::Needs(key, other, value) => json!({
            "if": {"required": [key]},
            "then": {"required": [other], "properties": is(other, *value)},
        }),
        KeyRule::Unless(key, other, value) => json!({
            "if": {"required": [other], "properties": is(other, *value)},
            "then": {"not": {"required": [key]}},
            "else": {"required": [key]},
        }),
        KeyRule::When(key, value, conditions) => {
            let conditions: Vec<_> = conditions
                .iter()
                .map(|condition| match condition {
                    Condition::Absent(other) => json!({"not": {"required": [other]}}),
                    Condition::Present(other) => json!({"required": [other]}),
                    Condition::Within(other, low, high) => {
                        json!({"properties": {*other: {"minimum": low, "maximum": high}}})
                    }
                    Condition::Is(other, value) => json!({"properties": is(other, *value)}),
                })
                .collect();
            json!({
                "if": {"required": [key], "properties": is(key, *value)},
                "then": {"allOf": conditions},
            })
        }
    }
}

pub fn events() -> Value {
    let mut definitions = Map::new();
    for event in events::EVENTS {
        let name = format!("event-{}", event.name);
        definitions.insert(name, object_of(event, json!({"const": event.name}), &[events::COMMON]));
    }
    // A run that a second signal stops has no time to look at the clock.
    for result in results::RESULTS {
        let mut schema = object_of(result, json!({"const": "result"}), &[events::COMMON, results::COMMON]);
        if let Some(required) = schema["required"].as_array_mut() {
            required.retain(|name| name != "at_ms");
        }
        definitions.insert(format!("result-{}", result.name.replace(' ', "-")), schema);
    }
    let any: Vec<_> = definitions.keys().map(|name| json!({"$ref": format!("#/$defs/{name}")})).collect();
    let schema = json!({"anyOf": any, "$defs": definitions});
    titled(schema, "oven --json", "One line of the stream that oven prints with --json.")
}

fn object_of(event: &EventSpec, word: Value, common: &[&[EventField]]) -> Value {
    let fields = common.iter().flat_map(|fields| *fields).chain(event.fields);
    let mut schema = object(fields);
    schema["description"] = json!(event.doc);
    schema["properties"]["event"] = word;
    schema["properties"]["format"] =
        json!({"const": events::FORMAT, "description": "The version of the stream."});
    if let Some(required) = schema["required"].as_array_mut() {
        required.extend([json!("event"), json!("format")]);
    }
    schema
}

fn object<'f>(fields: impl Iterator<Item = &'f EventField> + Clone) -> Value {
    let property = |field: &EventField| {
        let mut schema = json_type(&field.value);
        schema["description"] = json!(field.doc);
        (field.name.to_owned(), schema)
    };
    let required: Vec<_> = fields.clone().filter(|field| field.always).map(|field| field.name).collect();
    let properties: Map<_, _> = fields.map(property).collect();
    json!({"type": "object", "additionalProperties": false, "properties": properties, "required": required})
}

fn json_type(of: &JsonType) -> Value {
    match of {
        JsonType::Text => json!({"type": "string"}),
        JsonType::Words(words) => json!({"type": "string", "enum": words}),
        JsonType::Integer => json!({"type": "integer", "minimum": 0}),
        JsonType::Boolean => json!({"type": "boolean"}),
        JsonType::List(element) => json!({"type": "array", "items": json_type(element)}),
        JsonType::Map(value) => json!({"type": "object", "additionalProperties": json_type(value)}),
        JsonType::Object(fields) => object(fields.iter()),
        JsonType::OrNull(of) => {
            let mut schema = json_type(of);
            schema["type"] = json!([schema["type"], "null"]);
            schema
        }
        JsonType::Either(types) => json!({"anyOf": types.iter().map(json_type).collect::<Vec<_>>()}),
        JsonType::Anything => json!({}),
    }
}
