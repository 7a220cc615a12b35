//! Tests that the schemas agree with the types: both must accept and reject the same documents. The documents are
//! samples that set every field, and copies of these samples. Each copy is changed in one place.

use oven_distro::wire::{ClaimsAnswer, ClaimsRequest, PlanAnswer, PlanRequest};
use oven_distro::*;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::path::Path;

/// A JSON schema. Only the keywords that the schemas use are implemented. With an unknown keyword, the test fails.
struct Schema(Value);

impl Schema {
    fn read(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("schema").join(format!("{name}.json"));
        Self(serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap())
    }

    fn accepts(&self, value: &Value) -> bool {
        self.fits(&self.0, value)
    }

    fn fits(&self, schema: &Value, value: &Value) -> bool {
        let schema = schema.as_object().expect("a schema is an object");
        schema.iter().all(|(word, rule)| match word.as_str() {
            "$schema" | "$defs" | "title" | "description" => true,
            "$ref" => {
                let pointer = rule.as_str().unwrap().strip_prefix('#').unwrap();
                self.fits(self.0.pointer(pointer).expect("a definition"), value)
            }
            "type" => match rule {
                Value::Array(types) => types.iter().any(|name| is(name, value)),
                name => is(name, value),
            },
            "const" => rule == value,
            "enum" => rule.as_array().unwrap().contains(value),
            "oneOf" => rule.as_array().unwrap().iter().filter(|one| self.fits(one, value)).count() == 1,
            "minimum" => value.as_i64().is_none_or(|number| number >= rule.as_i64().unwrap()),
            "maximum" => value.as_u64().is_none_or(|number| number <= rule.as_u64().unwrap()),
            "items" => value.as_array().is_none_or(|items| items.iter().all(|item| self.fits(rule, item))),
            "required" => value.as_object().is_none_or(|object| {
                rule.as_array().unwrap().iter().all(|key| object.contains_key(key.as_str().unwrap()))
            }),
            "properties" => value.as_object().is_none_or(|object| {
                object.iter().all(|(key, field)| rule.get(key).is_none_or(|rule| self.fits(rule, field)))
            }),
            "additionalProperties" => value.as_object().is_none_or(|object| {
                let known = schema.get("properties").and_then(Value::as_object);
                let known = |key: &String| known.is_some_and(|known| known.contains_key(key));
                let mut others = object.iter().filter(|(key, _)| !known(key));
                if *rule == json!(false) {
                    others.next().is_none()
                } else {
                    others.all(|(_, field)| self.fits(rule, field))
                }
            }),
            other => panic!("{other} is not known to this test"),
        })
    }

    /// The names of all fields of the schema.
    fn fields(&self) -> BTreeSet<String> {
        fn collect(value: &Value, fields: &mut BTreeSet<String>) {
            match value {
                Value::Object(object) => object.iter().for_each(|(key, value)| {
                    if key == "properties" {
                        fields.extend(value.as_object().unwrap().keys().cloned());
                    }
                    collect(value, fields);
                }),
                Value::Array(array) => array.iter().for_each(|value| collect(value, fields)),
                _ => {}
            }
        }
        let mut fields = BTreeSet::new();
        collect(&self.0, &mut fields);
        fields
    }
}

fn is(name: &Value, value: &Value) -> bool {
    match name.as_str().unwrap() {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "null" => value.is_null(),
        other => panic!("{other} is not known to this test"),
    }
}

/// Copies of the document. Each is changed in one place, in one of the ways that are listed here.
fn mutations(value: &Value) -> Vec<Value> {
    let mut all = vec![
        json!(null),
        json!(true),
        json!(7),
        json!(-1),
        json!(1.5),
        json!(1e300),
        json!("x"),
        json!([]),
        json!({}),
    ];
    all.push(json!([null]));
    all.push(json!({"oven": null}));
    if let Some(word) = value.as_str() {
        // serde also accepts this form for a variant of an enumeration.
        all.push(json!({word: null}));
    }
    match value {
        Value::Object(object) => {
            for (key, field) in object {
                let mut without = object.clone();
                without.remove(key);
                all.push(Value::Object(without));
                for other in mutations(field) {
                    let mut with = object.clone();
                    with.insert(key.clone(), other);
                    all.push(Value::Object(with));
                }
            }
            let mut more: Map<_, _> = object.clone();
            more.insert("oven-check".into(), json!("x"));
            all.push(Value::Object(more));
        }
        Value::Array(array) => {
            for (index, item) in array.iter().enumerate() {
                for other in mutations(item) {
                    let mut with = array.clone();
                    with[index] = other;
                    all.push(Value::Array(with));
                }
            }
        }
        _ => {}
    }
    all
}

fn agree(name: &str, samples: &[Value], types_accept: &dyn Fn(&str) -> bool) {
    let schema = Schema::read(name);
    let mut tried = 0;
    for sample in samples {
        assert!(types_accept(&sample.to_string()) && schema.accepts(sample), "{name}: {sample:#}");
        for other in mutations(sample) {
            let (types, schema) = (types_accept(&other.to_string()), schema.accepts(&other));
            assert_eq!(types, schema, "{name}: the types say {types}, the schema {schema}: {other:#}");
            tried += 1;
        }
    }
    assert!(tried > 50, "{tried}");
    // Every field must be in a sample, because otherwise the loop above did not test it.
    let mut used = BTreeSet::new();
    fn keys(value: &Value, used: &mut BTreeSet<String>) {
        match value {
            Value::Object(object) => object.iter().for_each(|(key, value)| {
                used.insert(key.clone());
                keys(value, used);
            }),
            Value::Array(array) => array.iter().for_each(|value| keys(value, used)),
            _ => {}
        }
    }
    samples.iter().for_each(|sample| keys(sample, &mut used));
    let missing: Vec<_> = schema.fields().difference(&used).cloned().collect();
    assert_eq!(missing, Vec::<String>::new(), "{name}: no sample has these fields");
}

fn os_release() -> OsRelease {
    OsRelease::parse("ID=void\nPRETTY_NAME=\"Void Linux\"\n")
}

fn job() -> Job {
    let text = || Some("text".to_owned());
    // Every field is listed. So if `Job` has a new field, this does not compile until the field is added here. Then the
    // test fails until the schema has the field.
    Job {
        os_release: os_release(),
        architecture: "x86_64".into(),
        present: [("/usr/bin/xbps-install".to_owned(), true)].into(),
        texts: [("/etc/x.conf".to_owned(), "x\n".to_owned())].into(),
        packages: vec![
            Package::Named { name: "jq".into(), version: text(), suite: text() },
            Package::Group { name: "base-devel".into() },
            Package::File {
                path: "/x".into(),
                name: "x".into(),
                version: "1".into(),
                architecture: "all".into(),
            },
        ],
        upgrade: Upgrade::Security,
        repositories: vec![Repository {
            name: "x".into(),
            url: "https://x.example".into(),
            key: text(),
            suite: text(),
            components: vec!["main".into()],
            keep: true,
            priority: Some(600),
        }],
        hold: vec!["linux".into()],
        debconf: vec!["a b c d".into()],
        tools: vec!["ansible-playbook".into()],
        recommends: true,
        conffiles: Conffiles::Replace,
        network: true,
        mirror: text(),
        ca_file: text(),
    }
}

fn plan() -> Plan {
    let text = || Some("text".to_owned());
    let shim = || vec![Shim { path: "/etc/x".into(), content: "x".into(), mode: 0o644 }];
    let trouble =
        || vec![Trouble { output: "E: *".into(), means: "{1}".into(), hint: text(), package: text() }];
    let step = || {
        vec![Step {
            phase: Phase::Fetch,
            why: "looking".into(),
            argv: vec!["true".into()],
            env: [("A".to_owned(), "b".to_owned())].into(),
            retries: 1,
            before_retry: vec!["true".into()],
            network: true,
            also_good: vec![102],
            once: true,
            timeout: 60,
        }]
    };
    Plan {
        shims: shim(),
        files: shim(),
        steps: step(),
        facts: [("packages".to_owned(), vec!["list".to_owned()])].into(),
        expect: Expect {
            sound: vec!["ii".into()],
            absent: vec!["rc".into()],
            packages: vec![Wanted { name: "jq".into(), architecture: text(), version: text() }],
        },
        troubles: trouble(),
        failures: trouble(),
        notes: trouble(),
        progress: vec![ProgressLine {
            output: "got *".into(),
            phases: vec![Phase::Fetch],
            done: text(),
            total: text(),
            unit: text(),
            bytes: text(),
            total_bytes: text(),
            percent: text(),
            name: text(),
        }],
        caches: vec![Cache {
            path: "/var/cache/pkg".into(),
            holds: Holds::Packages,
            sources: vec!["/etc/pkg".into()],
        }],
        versions: vec!["list".into(), "{name}".into()],
        tools: Some(Tools {
            steps: step(),
            unneeded: Question {
                argv: vec!["pkg".into()],
                env: [("A".to_owned(), "b".to_owned())].into(),
                output: "* is an orphan".into(),
            },
            remove: step(),
        }),
    }
}

fn value(of: impl serde::Serialize) -> Value {
    serde_json::to_value(of).unwrap()
}

#[test]
fn the_schema_of_claims_requests_agrees_with_the_types() {
    let sample = value(ClaimsRequest::new(&os_release()));
    agree("claims.request", &[sample], &|text| ClaimsRequest::read(text).is_ok());
}

#[test]
fn the_schema_of_claims_answers_agrees_with_the_types() {
    let mut samples = vec![value(ClaimsAnswer::new(Err(Refused("no".into()))))];
    for claim in [Claim::No, Claim::Family, Claim::Exact] {
        let claims = Claims { claim, look_for: vec!["/x".into()], read: vec!["/y".into()] };
        samples.push(value(ClaimsAnswer::new(Ok(claims))));
    }
    agree("claims.answer", &samples, &|text| ClaimsAnswer::read(text).is_ok());
}

#[test]
fn the_schema_of_plan_requests_agrees_with_the_types() {
    let mut samples = vec![value(PlanRequest::new(&job()))];
    for (upgrade, conffiles) in [(Upgrade::None, Conffiles::Keep), (Upgrade::All, Conffiles::Keep)] {
        samples.push(value(PlanRequest::new(&Job { upgrade, conffiles, ..Job::default() })));
    }
    agree("plan.request", &samples, &|text| PlanRequest::read(text).is_ok());
}

#[test]
fn the_schema_of_plan_answers_agrees_with_the_types() {
    let mut samples =
        vec![value(PlanAnswer::new(Err(Refused("no".into())))), value(PlanAnswer::new(Ok(plan())))];
    for phase in [Phase::Prepare, Phase::Upgrade, Phase::Install, Phase::Verify, Phase::Clean] {
        let steps = vec![Step { phase, ..plan().steps[0].clone() }];
        samples.push(value(PlanAnswer::new(Ok(Plan { steps, ..Plan::default() }))));
    }
    agree("plan.answer", &samples, &|text| PlanAnswer::read(text).is_ok());
}
