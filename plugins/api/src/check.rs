//! The conformance suite: what every plugin has to hold to, tried from outside, through the text that is spoken. So an
//! executable and a [`Distro`] in Rust are tried alike.

mod difference;
mod heeds;
mod names;
mod samples;

use crate::wire::{self, ClaimsAnswer, ClaimsRequest, PlanAnswer, PlanRequest};
use crate::{
    Claim, Claims, Distro, Job, OsRelease, Package, Plan, Refused, faults_of_claims, faults_of_plan,
};
pub use difference::difference;
use serde_json::{Value, json};
use std::fmt;

/// Who answers requests.
pub trait Speaker {
    /// The answer to a request, both as text. An error says why there is none: it crashed, it took too long.
    fn ask(&self, verb: &str, request: &str) -> Result<String, String>;
}

/// A plugin in Rust, spoken to as if it were an executable.
pub struct InProcess<'a>(pub &'a dyn Distro);

impl Speaker for InProcess<'_> {
    fn ask(&self, verb: &str, request: &str) -> Result<String, String> {
        Ok(wire::answer(self.0, verb, request))
    }
}

/// A golden plan: a job, and the answer that its author looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Case {
    pub name: String,
    pub job: Job,
    /// `None`: not written down yet.
    pub answer: Option<Result<Plan, Refused>>,
}

/// What is tried, in the order in which it is told.
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
            Self::Answers => "it answers every request, in time and in the contract's form",
            Self::Sound => "answers are sound: phases in order, paths inside, network for fetch steps alone",
            Self::Deterministic => "the same request gets the same answer",
            Self::Unknown => "unknown systems get no",
            Self::Plans => "it claims a system, plans for it, and proves that packages are there",
            Self::Strict => "unknown fields, kinds and versions are refused",
            Self::Heeds => "nothing that a job asks for is passed over in silence",
            Self::Names => "names are only names: no option, no script",
            Self::Golden => "golden plans",
        })
    }
}

/// What was found.
#[derive(Debug, Default)]
pub struct Findings {
    faults: Vec<(Rule, String)>,
    /// Not all was tried: it claims nothing, or left too many requests without an answer.
    pub incomplete: bool,
}

impl Findings {
    pub fn is_fine(&self) -> bool {
        self.faults.is_empty()
    }

    /// What breaks a rule.
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

/// One line for each fault, and nothing if there is none.
impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.faults.iter().try_for_each(|(rule, fault)| writeln!(f, "{rule}: {fault}"))
    }
}

/// The systems that a plugin is shown, by name.
pub fn systems() -> Vec<(String, OsRelease)> {
    samples::known().into_iter().map(|(name, text)| (name, OsRelease::parse(text))).collect()
}

/// After so many requests without an answer the others are not tried: each may take as long as it is given.
const GIVE_UP: usize = 3;

/// Tries a plugin in Rust: `assert!(findings.is_fine(), "{findings}")`.
pub fn check(distro: &dyn Distro, cases: &[Case]) -> Findings {
    check_speaker(&InProcess(distro), cases)
}

/// Tries whoever answers.
pub fn check_speaker(speaker: &dyn Speaker, cases: &[Case]) -> Findings {
    let mut suite = Suite { speaker, findings: Findings::default(), silent: 0 };
    suite.run(cases);
    suite.findings.faults.sort_by_key(|(rule, _)| *rule);
    suite.findings
}

/// The answers to golden plans' requests as they are now, to be written down. An error names the case.
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

/// The plugin did not answer often enough.
struct GaveUp;

type Tried<T> = Result<T, GaveUp>;

impl Suite<'_> {
    fn run(&mut self, cases: &[Case]) {
        self.findings.incomplete = !matches!(self.all(cases), Ok(true));
    }

    /// Whether there was a system to try the rest with.
    fn all(&mut self, cases: &[Case]) -> Tried<bool> {
        let own = self.systems(cases)?;
        let golden = self.golden(cases)?;
        let Some((os, claims)) = own else { return Ok(false) };
        self.strict(&os)?;
        let job = match golden {
            Some(job) => Job { packages: Vec::new(), ..blank(&job) },
            None => {
                let present = claims.look_for.iter().map(|path| (path.clone(), true)).collect();
                Job { os_release: os, present, ..blank(&Job::default()) }
            }
        };
        heeds::run(self, &job)?;
        names::run(self, &job)?;
        Ok(true)
    }

    fn fault(&mut self, rule: Rule, fault: impl Into<String>) {
        self.findings.add(rule, fault);
    }

    /// Asks twice, and compares.
    fn ask(&mut self, about: &str, verb: &str, request: &str) -> Tried<Option<String>> {
        let (first, second) = (self.speaker.ask(verb, request), self.speaker.ask(verb, request));
        for answer in [&first, &second] {
            if let Err(why) = answer {
                self.fault(Rule::Answers, format!("{verb} {about}: {why}"));
                self.silent += 1;
            }
        }
        if self.silent >= GIVE_UP {
            return Err(GaveUp);
        }
        let (Ok(first), Ok(second)) = (first, second) else { return Ok(None) };
        let same = match (serde_json::from_str::<Value>(&first), serde_json::from_str::<Value>(&second)) {
            (Ok(first), Ok(second)) => difference(&first, &second).map_or(Ok(()), Err),
            _ if first == second => Ok(()),
            _ => Err("the texts differ".to_owned()),
        };
        if let Err(what) = same {
            self.fault(Rule::Deterministic, format!("{verb} {about}, asked twice: {what}"));
        }
        Ok(Some(first))
    }

    fn claims(&mut self, about: &str, os: &OsRelease) -> Tried<Option<Claims>> {
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

    /// A plan, or a refusal; `None` if there is no answer that can be understood.
    fn plan(&mut self, about: &str, job: &Job) -> Tried<Option<Result<Plan, Refused>>> {
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

    /// Claims on known and unknown systems; the plugin's own with the best claim.
    fn systems(&mut self, cases: &[Case]) -> Tried<Option<(OsRelease, Claims)>> {
        let of_cases = cases.iter().map(|case| (case.name.clone(), case.job.os_release.clone()));
        let mut own: Vec<(OsRelease, Claims)> = Vec::new();
        for (name, os) in of_cases.chain(systems()) {
            if let Some(claims) = self.claims(&format!("({name})"), &os)?
                && claims.claim != Claim::No
            {
                own.push((os, claims));
            }
        }
        // The first of the best: the author's own cases come first.
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
                unknown.push(("another ID, and its own in other fields", other));
            }
            None if self.findings.is_fine() => {
                self.fault(
                    Rule::Plans,
                    "it claims none of the systems that it was shown: give it a golden plan of its own",
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

    /// The golden plans; the first job for which there is a plan with steps.
    fn golden(&mut self, cases: &[Case]) -> Tried<Option<Job>> {
        let mut good = None;
        for case in cases {
            let Some(now) = self.plan(&format!("({})", case.name), &case.job)? else { continue };
            if good.is_none() && now.as_ref().is_ok_and(|plan| !plan.steps.is_empty()) {
                good = Some(case.job.clone());
            }
            match &case.answer {
                None => self.fault(Rule::Golden, format!("{}: no plan is written down yet", case.name)),
                Some(kept) => {
                    let [kept, now] = [kept, &now].map(|answer| value(&PlanAnswer::new(answer.clone())));
                    if let Some(what) = difference(&kept, &now) {
                        self.fault(Rule::Golden, format!("{}: {what}", case.name));
                    }
                }
            }
        }
        Ok(good)
    }

    /// Requests of a later version, and requests with what nobody knows yet.
    fn strict(&mut self, os: &OsRelease) -> Tried<()> {
        let claims = value(&ClaimsRequest::new(os));
        let job = Job { os_release: os.clone(), ..blank(&Job::default()) };
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
            ("claims", "a field that nobody knows", with(&claims, "", unknown.clone())),
            ("claims", "a later version of the contract", with(&claims, "", later.clone())),
            ("plan", "a field that nobody knows", with(&plan, "", unknown.clone())),
            ("plan", "a field of the job that nobody knows", with(&plan, "/job", unknown)),
            ("plan", "a later version of the contract", with(&plan, "", later)),
            ("plan", "a kind of package that nobody knows", with(&plan, "/job", kind)),
            ("plan", "a field of a package that nobody knows", with(&plan, "/job", field)),
        ] {
            // To end badly is as good as a refusal: nothing is done.
            let Ok(answer) = self.speaker.ask(verb, &request.to_string()) else { continue };
            let refused = match verb {
                "claims" => ClaimsAnswer::read(&answer).is_ok_and(|answer| answer.is_err()),
                _ => PlanAnswer::read(&answer).is_ok_and(|answer| answer.is_err()),
            };
            if !refused {
                self.fault(Rule::Strict, format!("{verb} with {about}: it answers as if it were not there"));
            }
        }
        Ok(())
    }
}

/// What is the same for every job of the suite: of a job, where it is for.
fn blank(job: &Job) -> Job {
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
    Package::Named { name: name.to_owned(), version: None }
}

fn text(request: &impl serde::Serialize) -> String {
    serde_json::to_string(request).expect("texts, numbers and maps with texts as keys become JSON")
}

fn value(request: &impl serde::Serialize) -> Value {
    serde_json::to_value(request).expect("texts, numbers and maps with texts as keys become JSON")
}

#[cfg(test)]
mod tests;
