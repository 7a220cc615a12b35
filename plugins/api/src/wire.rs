//! What oven and a plugin that is an executable say to each other: `PLUGIN claims` and `PLUGIN plan`, one JSON object on
//! standard input, one on standard output.

use crate::{Claim, Claims, Distro, Job, OsRelease, Plan, Refused};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::io::{Read, Write};
use std::process::ExitCode;

/// The version of this contract: `api` in every request and answer. A change that an older plugin would not notice
/// raises it; a field that is left out where a definition does not use it does not.
pub const API: u32 = 1;
/// What a plugin is asked.
pub const VERBS: [&str; 2] = ["claims", "plan"];
/// How a program ends that was called wrongly.
const USAGE: u8 = 2;

/// What `PLUGIN claims` is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClaimsRequest {
    pub api: u32,
    pub os_release: OsRelease,
}

/// What `PLUGIN plan` is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanRequest {
    pub api: u32,
    pub job: Job,
}

/// What `PLUGIN claims` answers: [`Claims`], or why it cannot tell.
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

/// What `PLUGIN plan` answers: a plan, or why there is none.
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

    /// Reads a request; an error says why it cannot be served.
    pub fn read(text: &str) -> Result<Self, Refused> {
        request_of(text)
    }
}

impl PlanRequest {
    pub fn new(job: &Job) -> Self {
        Self { api: API, job: job.clone() }
    }

    /// Reads a request; an error says why it cannot be served.
    pub fn read(text: &str) -> Result<Self, Refused> {
        request_of(text)
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

    /// Reads an answer. The outer error says what is wrong with it, the inner one is the plugin's own.
    pub fn read(text: &str) -> Result<Result<Claims, Refused>, String> {
        let Self { api, claim, look_for, read, refused } = answer_of(text)?;
        ensure_version(api)?;
        match (claim, refused) {
            (Some(claim), None) => Ok(Ok(Claims { claim, look_for, read })),
            (None, Some(refused)) if look_for.is_empty() && read.is_empty() => Ok(Err(refused)),
            (None, Some(_)) => Err("refuses, and lists paths all the same".into()),
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

    /// Reads an answer. The outer error says what is wrong with it, the inner one is the plugin's own.
    pub fn read(text: &str) -> Result<Result<Plan, Refused>, String> {
        let Self { api, plan, refused } = answer_of(text)?;
        ensure_version(api)?;
        match (plan, refused) {
            (Some(plan), None) => Ok(Ok(plan)),
            (None, Some(refused)) => Ok(Err(refused)),
            (Some(_), Some(_)) => Err("has both `plan` and `refused`".into()),
            (None, None) => Err("has neither `plan` nor `refused`".into()),
        }
    }
}

fn request_of<T: Serialize + DeserializeOwned>(text: &str) -> Result<T, Refused> {
    let unreadable = |error: String| Refused(format!("the request cannot be understood: {error}"));
    // The version first: a request of another one may have other fields.
    let request: Value = serde_json::from_str(text).map_err(|error| unreadable(error.to_string()))?;
    match request.get("api").and_then(Value::as_u64) {
        Some(api) if api == u64::from(API) => strict(text).map_err(unreadable),
        Some(api) => {
            Err(Refused(format!("the request is of version {api} of the contract, and this is {API}")))
        }
        None => Err(Refused("the request does not say its version: `api`".into())),
    }
}

fn answer_of<T: Serialize + DeserializeOwned>(text: &str) -> Result<T, String> {
    if text.trim().is_empty() {
        return Err("is empty: one JSON object is expected on standard output".into());
    }
    strict(text).map_err(|error| format!("is not what the contract says: {error}"))
}

/// Reads a text as the contract spells it: serde also takes an array for a structure, and an object for a word.
fn strict<T: Serialize + DeserializeOwned>(text: &str) -> Result<T, String> {
    let read: T = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let spelt = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let meant = serde_json::to_value(&read).map_err(|error| error.to_string())?;
    match misspelt(&spelt, &meant, String::new()) {
        Some(what) => Err(what),
        None => Ok(read),
    }
}

/// Where a document has an array or an object, and what it was read as has not.
fn misspelt(spelt: &Value, meant: &Value, at: String) -> Option<String> {
    match (spelt, meant) {
        (Value::Object(spelt), Value::Object(meant)) => spelt.iter().find_map(|(key, value)| {
            // What is left out when it is written is the default.
            misspelt(value, meant.get(key)?, format!("{at}.{key}"))
        }),
        (Value::Array(spelt), Value::Array(meant)) => {
            let pairs = spelt.iter().zip(meant).enumerate();
            pairs.into_iter().find_map(|(i, (spelt, meant))| misspelt(spelt, meant, format!("{at}[{i}]")))
        }
        (Value::Array(_), _) => Some(format!("`{}` is an array", at.trim_start_matches('.'))),
        (Value::Object(_), _) => Some(format!("`{}` is an object", at.trim_start_matches('.'))),
        _ => None,
    }
}

fn ensure_version(api: u32) -> Result<(), String> {
    if api == API { Ok(()) } else { Err(format!("is of version {api} of the contract, and this is {API}")) }
}

/// Makes a [`Distro`] an executable: `fn main() -> ExitCode { oven_distro::serve(&Void) }`.
///
/// A request that cannot be served is refused in an answer, with exit status 0; exit status 2 is a wrong command line.
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

/// A plugin's answer, as text, to a request, as text. `verb` is one of [`VERBS`].
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
            ("", "cannot be understood"),
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
            (r#"{"api":1,"refused":"x","read":["/x"]}"#, "all the same"),
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
