//! The protocol between oven and a plugin that is an executable: `PLUGIN claims` and `PLUGIN plan` read one JSON
//! object from standard input, and write one to standard output.

use crate::{Claim, Claims, Distro, Job, OsRelease, Plan, Refused};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::io::{Read, Write};
use std::process::ExitCode;

/// The version of this contract, which is the field `api` in every request and answer. It is raised for a change that
/// older plugins would not notice. It is not raised for a new field that oven sends only if a definition uses it. An
/// older plugin refuses such a request, because it does not know the field.
pub const API: u32 = 1;
/// The verbs of the two requests. A plugin gets the verb as its first argument.
pub const VERBS: [&str; 2] = ["claims", "plan"];
/// The exit status for a wrong command line.
const USAGE: u8 = 2;

/// The request of `PLUGIN claims`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClaimsRequest {
    pub api: u32,
    pub os_release: OsRelease,
}

/// The request of `PLUGIN plan`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanRequest {
    pub api: u32,
    pub job: Job,
}

/// The answer of `PLUGIN claims`: [`Claims`], or the reason why the plugin refuses the request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClaimsAnswer {
    pub api: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim: Option<Claim>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub look_for: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub read: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<Refused>,
}

/// The answer of `PLUGIN plan`: a plan, or the reason why the plugin refuses the job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanAnswer {
    pub api: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<Plan>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<Refused>,
}

impl ClaimsRequest {
    pub fn new(os_release: &OsRelease) -> Self {
        Self { api: API, os_release: os_release.clone() }
    }

    /// Parses a request. The error says why the plugin cannot answer the request.
    pub fn read(text: &str) -> Result<Self, Refused> {
        parse_request(text)
    }
}

impl PlanRequest {
    pub fn new(job: &Job) -> Self {
        Self { api: API, job: job.clone() }
    }

    /// Parses a request. The error says why the plugin cannot answer the request.
    pub fn read(text: &str) -> Result<Self, Refused> {
        parse_request(text)
    }
}

impl ClaimsAnswer {
    pub fn new(claims: Result<Claims, Refused>) -> Self {
        let (api, empty) = (API, Vec::new);
        match claims {
            Ok(Claims { claim, look_for, read }) => {
                Self { api, claim: Some(claim), look_for, read, refused: None }
            }
            Err(refused) => {
                Self { api, claim: None, look_for: empty(), read: empty(), refused: Some(refused) }
            }
        }
    }

    /// Parses an answer. The outer error says what is wrong with the answer. The inner error is the plugin's refusal.
    pub fn read(text: &str) -> Result<Result<Claims, Refused>, String> {
        let Self { api, claim, look_for, read, refused } = parse_answer(text)?;
        ensure_version(api)?;
        match (claim, refused) {
            (Some(claim), None) => Ok(Ok(Claims { claim, look_for, read })),
            (None, Some(refused)) if look_for.is_empty() && read.is_empty() => Ok(Err(refused)),
            (None, Some(_)) => Err("has `refused`, but also lists paths".into()),
            (Some(_), Some(_)) => Err("has both `claim` and `refused`".into()),
            (None, None) => Err("has neither `claim` nor `refused`".into()),
        }
    }
}

impl PlanAnswer {
    pub fn new(plan: Result<Plan, Refused>) -> Self {
        match plan {
            Ok(plan) => Self { api: API, plan: Some(plan), refused: None },
            Err(refused) => Self { api: API, plan: None, refused: Some(refused) },
        }
    }

    /// Parses an answer. The outer error says what is wrong with the answer. The inner error is the plugin's refusal.
    pub fn read(text: &str) -> Result<Result<Plan, Refused>, String> {
        let Self { api, plan, refused } = parse_answer(text)?;
        ensure_version(api)?;
        match (plan, refused) {
            (Some(plan), None) => Ok(Ok(plan)),
            (None, Some(refused)) => Ok(Err(refused)),
            (Some(_), Some(_)) => Err("has both `plan` and `refused`".into()),
            (None, None) => Err("has neither `plan` nor `refused`".into()),
        }
    }
}

fn parse_request<T: Serialize + DeserializeOwned>(text: &str) -> Result<T, Refused> {
    let unreadable = |error: String| Refused(format!("the request cannot be parsed: {error}"));
    // The version is checked first, because a request of another version may have other fields.
    let request: Value = serde_json::from_str(text).map_err(|error| unreadable(error.to_string()))?;
    match request.get("api").and_then(Value::as_u64) {
        Some(api) if api == u64::from(API) => parse_strictly(text).map_err(unreadable),
        Some(api) => Err(Refused(format!(
            "the request has version {api} of the contract; this plugin supports version {API}"
        ))),
        None => Err(Refused("the request has no version: `api` is missing".into())),
    }
}

fn parse_answer<T: Serialize + DeserializeOwned>(text: &str) -> Result<T, String> {
    if text.trim().is_empty() {
        return Err("is empty: one JSON object is expected on standard output".into());
    }
    parse_strictly(text).map_err(|error| format!("does not follow the contract: {error}"))
}

/// Parses JSON strictly. serde would also accept an array instead of an object, and an object instead of a word.
fn parse_strictly<T: Serialize + DeserializeOwned>(text: &str) -> Result<T, String> {
    let value: T = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let document = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let parsed = serde_json::to_value(&value).map_err(|error| error.to_string())?;
    match find_wrong_type(&document, &parsed, String::new()) {
        Some(what) => Err(what),
        None => Ok(value),
    }
}

/// Finds a place where the document has an array or an object, but the parsed value has another type.
fn find_wrong_type(document: &Value, parsed: &Value, at: String) -> Option<String> {
    match (document, parsed) {
        (Value::Object(document), Value::Object(parsed)) => document.iter().find_map(|(key, value)| {
            // A field is missing in `parsed` only if it has its default value. A field with its default value has the
            // right type.
            find_wrong_type(value, parsed.get(key)?, format!("{at}.{key}"))
        }),
        (Value::Array(document), Value::Array(parsed)) => {
            let pairs = document.iter().zip(parsed).enumerate();
            pairs
                .into_iter()
                .find_map(|(i, (document, parsed))| find_wrong_type(document, parsed, format!("{at}[{i}]")))
        }
        (Value::Array(_), _) => Some(format!("`{}` is an array", at.trim_start_matches('.'))),
        (Value::Object(_), _) => Some(format!("`{}` is an object", at.trim_start_matches('.'))),
        _ => None,
    }
}

fn ensure_version(api: u32) -> Result<(), String> {
    if api == API {
        Ok(())
    } else {
        Err(format!("has version {api} of the contract; this oven supports version {API}"))
    }
}

/// Turns a [`Distro`] into an executable: `fn main() -> ExitCode { oven_distro::serve(&Void) }`.
///
/// If the plugin refuses a request, it writes a refusal as its answer, and the exit status is 0. Exit status 2 means
/// that the command line is wrong.
pub fn serve(distro: &impl Distro) -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let verb = match (arguments.next(), arguments.next()) {
        (Some(verb), None) if VERBS.contains(&verb.as_str()) => verb,
        _ => {
            eprintln!("usage: {} {}", distro.id(), VERBS.join("|"));
            return ExitCode::from(USAGE);
        }
    };
    let mut request = Vec::new();
    let read = std::io::stdin().lock().read_to_end(&mut request);
    let text = answer(distro, &verb, &String::from_utf8_lossy(&request));
    match read.and_then(|_| writeln!(std::io::stdout().lock(), "{text}")) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}: {error}", distro.id());
            ExitCode::FAILURE
        }
    }
}

/// Returns a plugin's answer to a request. Both are JSON text. `verb` is one of [`VERBS`].
pub fn answer(distro: &dyn Distro, verb: &str, request: &str) -> String {
    let text = match verb {
        "claims" => {
            let claims = ClaimsRequest::read(request).map(|request| distro.claims(&request.os_release));
            serde_json::to_string(&ClaimsAnswer::new(claims))
        }
        _ => {
            let plan = PlanRequest::read(request).and_then(|request| distro.plan(&request.job));
            serde_json::to_string(&PlanAnswer::new(plan))
        }
    };
    text.expect("texts, numbers and maps with texts as keys become JSON")
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixed;
    impl Distro for Fixed {
        fn id(&self) -> &str {
            "fixed"
        }
        fn claims(&self, os: &OsRelease) -> Claims {
            let claim = if os.id() == "fixed" { Claim::Exact } else { Claim::No };
            Claims { claim, look_for: vec!["/bin/pkg".into()], read: Vec::new() }
        }
        fn plan(&self, job: &Job) -> Result<Plan, Refused> {
            if job.recommends { Err(Refused("no".into())) } else { Ok(Plan::default()) }
        }
    }

    #[test]
    fn an_answer_is_what_the_distro_says() {
        let claims = answer(&Fixed, "claims", r#"{"api":1,"os_release":{"ID":"fixed"}}"#);
        assert_eq!(claims, r#"{"api":1,"claim":"exact","look_for":["/bin/pkg"]}"#);
        assert_eq!(ClaimsAnswer::read(&claims), Ok(Ok(Fixed.claims(&OsRelease::parse("ID=fixed")))));
        let mut job = Job::default();
        let ask = |job: &Job| {
            let request = serde_json::to_string(&PlanRequest::new(job)).unwrap();
            PlanAnswer::read(&answer(&Fixed, "plan", &request))
        };
        assert_eq!(ask(&job), Ok(Ok(Plan::default())));
        job.recommends = true;
        assert_eq!(ask(&job), Ok(Err(Refused("no".into()))));
    }

    #[test]
    fn a_request_that_cannot_be_understood_is_refused_as_data() {
        for (request, words) in [
            ("", "cannot be parsed"),
            ("[]", "version"),
            (r#"{"api":2,"os_release":{},"else":1}"#, "version 2"),
            (r#"{"os_release":{}}"#, "version"),
            (r#"{"api":1,"os_release":{},"else":1}"#, "`else`"),
        ] {
            let refused = ClaimsAnswer::read(&answer(&Fixed, "claims", request)).unwrap().unwrap_err();
            assert!(refused.0.contains(words), "{request}: {refused}");
            let refused = PlanAnswer::read(&answer(&Fixed, "plan", request)).unwrap().unwrap_err();
            assert!(!refused.0.is_empty(), "{request}");
        }
    }

    #[test]
    fn an_answer_that_is_none_says_why() {
        for (text, words) in [
            (" \n", "is empty"),
            ("claim: exact", "expected value"),
            (r#"{"api":1,"claim":"exact"} {}"#, "trailing"),
            (r#"{"api":7,"claim":"exact"}"#, "version 7"),
            (r#"{"api":1}"#, "neither"),
            (r#"{"api":1,"claim":"no","refused":"x"}"#, "both"),
            (r#"{"api":1,"refused":"x","read":["/x"]}"#, "also lists paths"),
            (r#"{"api":1,"claim":"exact","look-for":[]}"#, "`look-for`"),
            (r#"{"api":1,"claim":"perhaps"}"#, "`perhaps`"),
        ] {
            let wrong = ClaimsAnswer::read(text).unwrap_err();
            assert!(wrong.contains(words), "{text}: {wrong}");
        }
        for (text, words) in [
            (r#"{"api":1}"#, "neither"),
            (r#"{"api":1,"plan":{},"refused":"x"}"#, "both"),
            (r#"{"api":1,"plan":{"step":[]}}"#, "`step`"),
            (r#"{"api":1,"plan":[]}"#, "`plan` is an array"),
            (
                r#"{"api":1,"plan":{"steps":[{"phase":{"fetch":null},"why":"x","argv":[],"timeout":1}]}}"#,
                "`plan.steps[0].phase` is an object",
            ),
        ] {
            let wrong = PlanAnswer::read(text).unwrap_err();
            assert!(wrong.contains(words), "{text}: {wrong}");
        }
    }
}
