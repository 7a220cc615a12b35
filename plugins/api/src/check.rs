//! The conformance suite for plugins. It tests a plugin with JSON requests and answers. So an executable and a
//! [`Distro`] in Rust are tested in the same way.

mod difference;
mod golden;
mod heeds;
mod names;
mod samples;

use crate::wire::{self, ClaimsAnswer, ClaimsRequest, PlanAnswer, PlanRequest};
use crate::{
    Claim, Claims, Distro, Job, OsRelease, Package, Plan, Refused, faults_of_claims, faults_of_plan,
};
pub use difference::difference;
pub use golden::without_defaults;
use serde_json::{Value, json};
use std::fmt;

/// A plugin that answers JSON requests.
pub trait Speaker {
    /// Returns the answer to a request. Both are JSON text. The error is the reason why there is no answer, such as a
    /// crash or a timeout.
    fn ask(&self, verb: &str, request: &str) -> Result<String, String>;
}

/// A plugin in Rust, which is called as if it were an executable.
pub struct InProcess<'a>(pub &'a dyn Distro);

impl Speaker for InProcess<'_> {
    fn ask(&self, verb: &str, request: &str) -> Result<String, String> {
        Ok(wire::answer(self.0, verb, request))
    }
}

/// A golden plan: a job, and the answer that the plugin's author reviewed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Case {
    pub name: String,
    pub job: Job,
    /// `None` if no answer is stored yet.
    pub answer: Option<Result<Plan, Refused>>,
}

/// The rules of the suite, in the order in which they are reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    Answers,
    Sound,
    Deterministic,
    Unknown,
    Plans,
    Strict,
    Heeds,
    Names,
    Golden,
}

impl Rule {
    pub const ALL: [Self; 9] = [
        Self::Answers,
        Self::Sound,
        Self::Deterministic,
        Self::Unknown,
        Self::Plans,
        Self::Strict,
        Self::Heeds,
        Self::Names,
        Self::Golden,
    ];
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Answers => "it answers every request in time, in the form that the contract defines",
            Self::Sound => {
                "answers are valid: phases in order, paths inside the image, network only for fetch steps"
            }
            Self::Deterministic => "the same request gets the same answer",
            Self::Unknown => "it does not claim unknown systems",
            Self::Plans => "it claims a system, plans for it, and verifies that packages are installed",
            Self::Strict => "unknown fields, kinds and versions are refused",
            Self::Heeds => "it ignores nothing that a job asks for",
            Self::Names => "names of packages do not become options or parts of scripts",
            Self::Golden => "golden plans",
        })
    }
}

/// The result of the suite.
#[derive(Debug, Default)]
pub struct Findings {
    faults: Vec<(Rule, String)>,
    /// True if the suite could not finish: the plugin claims no system, or it left too many requests unanswered.
    pub incomplete: bool,
}

impl Findings {
    pub fn is_fine(&self) -> bool {
        self.faults.is_empty()
    }

    /// The faults that were found for this rule.
    pub fn of(&self, rule: Rule) -> impl Iterator<Item = &str> {
        self.faults.iter().filter(move |(broken, _)| *broken == rule).map(|(_, fault)| fault.as_str())
    }

    fn add(&mut self, rule: Rule, fault: impl Into<String>) {
        let fault = fault.into();
        if !self.faults.contains(&(rule, fault.clone())) {
            self.faults.push((rule, fault));
        }
    }
}

/// Writes one line for each fault, and nothing if there are no faults.
impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.faults.iter().try_for_each(|(rule, fault)| writeln!(f, "{rule}: {fault}"))
    }
}

/// The os-release files with which the suite asks a plugin for its claims, each with the system's name.
pub fn systems() -> Vec<(String, OsRelease)> {
    samples::known().into_iter().map(|(name, text)| (name, OsRelease::parse(text))).collect()
}

/// The suite stops after this many requests without an answer, because each of them may take the whole time limit.
const MAX_SILENT: usize = 3;

/// Tests a plugin in Rust: `assert!(findings.is_fine(), "{findings}")`.
pub fn check(distro: &dyn Distro, cases: &[Case]) -> Findings {
    check_speaker(&InProcess(distro), cases)
}

/// Tests any plugin.
pub fn check_speaker(speaker: &dyn Speaker, cases: &[Case]) -> Findings {
    let mut suite = Suite { speaker, findings: Findings::default(), silent: 0 };
    suite.run(cases);
    suite.findings.faults.sort_by_key(|(rule, _)| *rule);
    suite.findings
}

/// Asks the plugin for new answers to the jobs of the golden plans. The caller stores the answers. The error names the
/// case.
pub fn answers(speaker: &dyn Speaker, cases: &[Case]) -> Result<Vec<Result<Plan, Refused>>, String> {
    let answer = |case: &Case| {
        let answer = speaker.ask("plan", &text(&PlanRequest::new(&case.job)));
        let answer =
            answer.and_then(|text| PlanAnswer::read(&text).map_err(|wrong| format!("the answer {wrong}")));
        answer.map_err(|why| format!("{}: {why}", case.name))
    };
    cases.iter().map(answer).collect()
}

struct Suite<'a> {
    speaker: &'a dyn Speaker,
    findings: Findings,
    silent: usize,
}

/// The error if the plugin left too many requests unanswered.
struct TooSilent;

type TestResult<T> = Result<T, TooSilent>;

impl Suite<'_> {
    fn run(&mut self, cases: &[Case]) {
        self.findings.incomplete = !matches!(self.run_all(cases), Ok(true));
    }

    /// Returns false if some rules were not tested, because no suitable system was found.
    fn run_all(&mut self, cases: &[Case]) -> TestResult<bool> {
        let own = self.test_claims(cases)?;
        let golden = self.test_golden(cases)?;
        let Some((os, claims)) = own else { return Ok(false) };
        self.test_strictness(&os)?;
        let job = match golden {
            Some(job) => Job { packages: Vec::new(), ..job_without_requests(&job) },
            None => {
                let present = claims.look_for.iter().map(|path| (path.clone(), true)).collect();
                Job { os_release: os, present, ..job_without_requests(&Job::default()) }
            }
        };
        heeds::run(self, &job)?;
        names::run(self, &job)?;
        Ok(true)
    }

    fn fault(&mut self, rule: Rule, fault: impl Into<String>) {
        self.findings.add(rule, fault);
    }

    /// Sends a request twice, and checks that both answers are the same.
    fn ask(&mut self, about: &str, verb: &str, request: &str) -> TestResult<Option<String>> {
        let (first, second) = (self.speaker.ask(verb, request), self.speaker.ask(verb, request));
        for answer in [&first, &second] {
            if let Err(why) = answer {
                self.fault(Rule::Answers, format!("{verb} {about}: {why}"));
                self.silent += 1;
            }
        }
        if self.silent >= MAX_SILENT {
            return Err(TooSilent);
        }
        let (Ok(first), Ok(second)) = (first, second) else { return Ok(None) };
        let same = match (serde_json::from_str::<Value>(&first), serde_json::from_str::<Value>(&second)) {
            (Ok(first), Ok(second)) => difference(&first, &second).map_or(Ok(()), Err),
            _ if first == second => Ok(()),
            _ => Err("the texts differ".to_owned()),
        };
        if let Err(what) = same {
            self.fault(
                Rule::Deterministic,
                format!("{verb} {about}: the second answer to the same request differs: {what}"),
            );
        }
        Ok(Some(first))
    }

    fn claims(&mut self, about: &str, os: &OsRelease) -> TestResult<Option<Claims>> {
        let request = text(&ClaimsRequest::new(os));
        let Some(answer) = self.ask(about, "claims", &request)? else { return Ok(None) };
        let claims = match ClaimsAnswer::read(&answer) {
            Ok(Ok(claims)) => claims,
            Ok(Err(refused)) => {
                self.fault(Rule::Answers, format!("claims {about}: refused: {refused}"));
                return Ok(None);
            }
            Err(wrong) => {
                self.fault(Rule::Answers, format!("claims {about}: the answer {wrong}"));
                return Ok(None);
            }
        };
        for fault in faults_of_claims(&claims) {
            self.fault(Rule::Sound, format!("claims {about}: {fault}"));
        }
        Ok(Some(claims))
    }

    /// Asks for a plan. Returns the plan or the refusal, or `None` if the answer cannot be parsed.
    fn plan(&mut self, about: &str, job: &Job) -> TestResult<Option<Result<Plan, Refused>>> {
        let Some(answer) = self.ask(about, "plan", &text(&PlanRequest::new(job)))? else { return Ok(None) };
        match PlanAnswer::read(&answer) {
            Ok(Ok(plan)) => {
                for fault in faults_of_plan(&plan, job) {
                    self.fault(Rule::Sound, format!("plan {about}: {fault}"));
                }
                Ok(Some(Ok(plan)))
            }
            Ok(Err(refused)) => {
                if refused.0.trim().is_empty() {
                    self.fault(Rule::Answers, format!("plan {about}: refused without a reason"));
                }
                Ok(Some(Err(refused)))
            }
            Err(wrong) => {
                self.fault(Rule::Answers, format!("plan {about}: the answer {wrong}"));
                Ok(None)
            }
        }
    }

    /// Tests the claims on known and unknown systems. Returns the system with the plugin's best claim.
    fn test_claims(&mut self, cases: &[Case]) -> TestResult<Option<(OsRelease, Claims)>> {
        let of_cases = cases.iter().map(|case| (case.name.clone(), case.job.os_release.clone()));
        let mut own: Vec<(OsRelease, Claims)> = Vec::new();
        for (name, os) in of_cases.chain(systems()) {
            if let Some(claims) = self.claims(&format!("({name})"), &os)?
                && claims.claim != Claim::No
            {
                own.push((os, claims));
            }
        }
        // Selects the first of the best claims. The systems of the golden plans come first in the list, so they are
        // preferred.
        let best = own.iter().map(|(_, claims)| claims.claim).max().unwrap_or(Claim::No);
        let own = own.into_iter().find(|(_, claims)| claims.claim == best);
        let mut unknown: Vec<_> =
            samples::unknown().iter().map(|(name, text)| (*name, OsRelease::parse(text))).collect();
        match &own {
            Some((os, _)) => {
                let mut other: OsRelease = OsRelease(
                    os.0.iter().map(|(field, value)| (format!("OVEN_{field}"), value.clone())).collect(),
                );
                other.0.insert("ID".into(), "oven-check".into());
                unknown.push(("an unknown ID, and the values of a known system in other fields", other));
            }
            None if self.findings.is_fine() => {
                self.fault(
                    Rule::Plans,
                    "it claims none of the suite's systems: add a golden plan for the system that it supports",
                );
            }
            None => {}
        }
        for (name, os) in unknown {
            if let Some(claims) = self.claims(&format!("({name})"), &os)?
                && claims.claim != Claim::No
            {
                let claim = format!("{:?}", claims.claim).to_lowercase();
                self.fault(Rule::Unknown, format!("claims ({name}): {claim}"));
            }
        }
        Ok(own)
    }

    /// Tests the golden plans. Returns the first job whose plan has steps.
    fn test_golden(&mut self, cases: &[Case]) -> TestResult<Option<Job>> {
        let mut first = None;
        for case in cases {
            let Some(now) = self.plan(&format!("({})", case.name), &case.job)? else { continue };
            if first.is_none() && now.as_ref().is_ok_and(|plan| !plan.steps.is_empty()) {
                first = Some(case.job.clone());
            }
            match &case.answer {
                None => self.fault(Rule::Golden, format!("{}: no plan is stored yet", case.name)),
                Some(stored) => {
                    let [stored, now] = [stored, &now].map(|answer| value(&PlanAnswer::new(answer.clone())));
                    if let Some(what) = difference(&stored, &now) {
                        self.fault(Rule::Golden, format!("{}: {what}", case.name));
                    }
                }
            }
        }
        Ok(first)
    }

    /// Sends requests of a later version, and requests with unknown fields.
    fn test_strictness(&mut self, os: &OsRelease) -> TestResult<()> {
        let claims = value(&ClaimsRequest::new(os));
        let job = Job { os_release: os.clone(), ..job_without_requests(&Job::default()) };
        let plan = value(&PlanRequest::new(&job));
        let with = |request: &Value, at: &str, added: Value| {
            let mut request = request.clone();
            if let (Some(object), Value::Object(added)) =
                (request.pointer_mut(at).and_then(Value::as_object_mut), added)
            {
                object.extend(added);
            }
            request
        };
        let unknown = json!({"oven_check": true});
        let later = json!({"api": wire::API + 1});
        let kind = json!({"packages": [{"kind": "oven_check", "name": "tree"}]});
        let field = json!({"packages": [{"kind": "named", "name": "tree", "oven_check": true}]});
        for (verb, about, request) in [
            ("claims", "an unknown field", with(&claims, "", unknown.clone())),
            ("claims", "a later version of the contract", with(&claims, "", later.clone())),
            ("plan", "an unknown field", with(&plan, "", unknown.clone())),
            ("plan", "an unknown field of the job", with(&plan, "/job", unknown)),
            ("plan", "a later version of the contract", with(&plan, "", later)),
            ("plan", "an unknown kind of package", with(&plan, "/job", kind)),
            ("plan", "an unknown field of a package", with(&plan, "/job", field)),
        ] {
            // The plugin is allowed to fail instead of refusing the request. oven does nothing in both cases.
            let Ok(answer) = self.speaker.ask(verb, &request.to_string()) else { continue };
            let refused = match verb {
                "claims" => ClaimsAnswer::read(&answer).is_ok_and(|answer| answer.is_err()),
                _ => PlanAnswer::read(&answer).is_ok_and(|answer| answer.is_err()),
            };
            if !refused {
                self.fault(
                    Rule::Strict,
                    format!("{verb} with {about}: the plugin ignores it, but must refuse it"),
                );
            }
        }
        Ok(())
    }
}

/// A job without requests. It has only the image and the architecture of `job`.
fn job_without_requests(job: &Job) -> Job {
    let architecture =
        if job.architecture.is_empty() { "x86_64".to_owned() } else { job.architecture.clone() };
    Job {
        os_release: job.os_release.clone(),
        architecture,
        present: job.present.clone(),
        texts: job.texts.clone(),
        ..Job::default()
    }
}

fn named(name: &str) -> Package {
    Package::Named { name: name.to_owned(), version: None, suite: None }
}

fn text(request: &impl serde::Serialize) -> String {
    serde_json::to_string(request).expect("texts, numbers and maps with texts as keys become JSON")
}

fn value(request: &impl serde::Serialize) -> Value {
    serde_json::to_value(request).expect("texts, numbers and maps with texts as keys become JSON")
}

#[cfg(test)]
mod tests;
