//! Tests the suite itself. A correct plugin passes, and each kind of fault breaks exactly one rule.

use super::*;
use crate::{Expect, Phase, Shim, Step, Wanted};
use std::cell::Cell;

/// The fault of the tested plugin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    Everything,
    Nothing,
    Counts,
    Relative,
    Network,
    Back,
    Ignores,
    Script,
    Option,
    Unproven,
    Toolless,
}

struct Pkg(Fault, Cell<u32>);

impl Pkg {
    fn refuses(&self, job: &Job) -> Option<Refused> {
        let pinned = || Some("2.1.*".to_owned());
        let plain = |name: &str| {
            !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || ".+-".contains(c))
        };
        let names = job.packages.iter().all(|package| match package {
            Package::Named { name, version: None, suite: None }
                if matches!(self.0, Fault::Script | Fault::Option) =>
            {
                !name.is_empty()
            }
            Package::Named { name, version: None, suite: None } => plain(name) && !name.starts_with('-'),
            Package::Named { name, version, suite: None } => {
                self.0 == Fault::Ignores && plain(name) && *version == pinned()
            }
            _ => self.0 == Fault::Ignores,
        });
        let more = job.upgrade != crate::Upgrade::None
            || !job.repositories.is_empty()
            || !job.hold.is_empty()
            || !job.debconf.is_empty()
            || !job.tools.is_empty() && self.0 == Fault::Toolless;
        (!names || more && self.0 != Fault::Ignores).then(|| Refused("packages by name alone".into()))
    }
}

impl Distro for Pkg {
    fn id(&self) -> &str {
        "pkg"
    }
    fn claims(&self, os: &OsRelease) -> Claims {
        let claim = match self.0 {
            Fault::Everything => Claim::Family,
            Fault::Nothing => Claim::No,
            _ if os.id() == "void" => Claim::Exact,
            _ => Claim::No,
        };
        let relative = if self.0 == Fault::Relative { "bin/pkg" } else { "/bin/pkg" };
        Claims { claim, look_for: vec![relative.into()], read: Vec::new() }
    }
    fn plan(&self, job: &Job) -> Result<Plan, Refused> {
        if let Some(refused) = self.refuses(job) {
            return Err(refused);
        }
        let mut names: Vec<_> = job
            .packages
            .iter()
            .filter_map(|package| match package {
                Package::Named { name, .. } => Some(name.clone()),
                _ => None,
            })
            .collect();
        let wanted = |name: &String| Wanted { name: name.clone(), architecture: None, version: None };
        let mut packages: Vec<_> = names.iter().map(wanted).collect();
        if self.0 == Fault::Unproven {
            packages.clear();
        }
        let mut argv = match self.0 {
            Fault::Script => vec!["/bin/sh".into(), "-c".into(), format!("pkg add {}", names.concat())],
            Fault::Option => vec!["pkg".into(), "add".into()],
            _ => vec!["pkg".into(), "add".into(), "--".into()],
        };
        if self.0 != Fault::Script {
            argv.append(&mut names);
        }
        self.1.set(self.1.get() + 1);
        let why = if self.0 == Fault::Counts {
            format!("installing for the {}. time", self.1.get())
        } else {
            "installing packages".into()
        };
        let step = Step {
            phase: Phase::Install,
            why,
            argv,
            env: Default::default(),
            retries: 0,
            before_retry: Vec::new(),
            network: self.0 == Fault::Network,
            also_good: Vec::new(),
            once: false,
            timeout: 60,
        };
        let mut steps = vec![step.clone()];
        if self.0 == Fault::Back {
            steps.push(Step { phase: Phase::Prepare, ..step });
        }
        Ok(Plan {
            shims: vec![Shim { path: "/run/pkg.conf".into(), content: String::new(), mode: 0o644 }],
            steps,
            facts: [("packages".to_owned(), vec!["pkg".to_owned(), "list".to_owned()])].into(),
            expect: Expect { packages, ..Expect::default() },
            ..Plan::default()
        })
    }
}

fn found(fault: Fault) -> Findings {
    check(&Pkg(fault, Cell::new(0)), &[])
}

#[test]
fn a_correct_plugin_passes() {
    let findings = found(Fault::None);
    assert!(findings.is_fine() && !findings.incomplete, "{findings}");
}

#[test]
fn each_fault_breaks_its_rule_and_no_other() {
    for (fault, rule, words) in [
        (Fault::Everything, Rule::Unknown, "an unknown ID"),
        (Fault::Nothing, Rule::Plans, "claims none"),
        (Fault::Counts, Rule::Deterministic, "plan.steps[0].why"),
        (Fault::Relative, Rule::Sound, "\"bin/pkg\" is not absolute"),
        (Fault::Network, Rule::Sound, "step of phase install has `network`"),
        (Fault::Back, Rule::Sound, "phases never go back"),
        (Fault::Ignores, Rule::Heeds, "a group"),
        (Fault::Script, Rule::Names, "part of a script for sh"),
        (Fault::Option, Rule::Names, "`--` before names"),
        (Fault::Unproven, Rule::Plans, "nothing verifies"),
        (Fault::Toolless, Rule::Heeds, "a tool for the bake is refused"),
    ] {
        let findings = found(fault);
        assert!(findings.of(rule).any(|found| found.contains(words)), "{fault:?}: {findings}");
        assert!(findings.faults.iter().all(|(broken, _)| *broken == rule), "{fault:?}: {findings}");
    }
}

/// A plugin whose answers come from a closure.
struct Answering<F>(F);
impl<F: Fn(&str, &str) -> Result<String, String>> Speaker for Answering<F> {
    fn ask(&self, verb: &str, request: &str) -> Result<String, String> {
        (self.0)(verb, request)
    }
}

#[test]
fn invalid_answers_are_reported() {
    let garbage = check_speaker(&Answering(|_: &str, _: &str| Ok("hello\n".into())), &[]);
    assert!(
        garbage.of(Rule::Answers).any(|fault| fault.contains("does not follow the contract")),
        "{garbage}"
    );

    let calls = Cell::new(0);
    let dead = Answering(|_: &str, _: &str| {
        calls.set(calls.get() + 1);
        Err("it took longer than 10 s".to_owned())
    });
    let findings = check_speaker(&dead, &[]);
    assert!(findings.incomplete && calls.get() <= 4, "{} calls", calls.get());
    assert!(findings.of(Rule::Answers).all(|fault| fault.contains("longer than 10 s")));
}

#[test]
fn a_plugin_that_ignores_unknown_fields_is_reported() {
    let good = Pkg(Fault::None, Cell::new(0));
    let lenient = Answering(|verb: &str, request: &str| {
        let mut request: Value = serde_json::from_str(request).unwrap();
        request["api"] = json!(1);
        let known = ["api", "os_release", "job"];
        request.as_object_mut().unwrap().retain(|key, _| known.contains(&key.as_str()));
        if let Some(job) = request.get_mut("job").and_then(Value::as_object_mut) {
            job.remove("oven_check");
        }
        Ok(wire::answer(&good, verb, &request.to_string()))
    });
    let findings = check_speaker(&lenient, &[]);
    assert_eq!(findings.of(Rule::Strict).count(), 5, "{findings}");
    assert_eq!(findings.faults.len(), 5, "{findings}");
}

#[test]
fn golden_plans() {
    let good = Pkg(Fault::None, Cell::new(0));
    let job = Job {
        os_release: OsRelease::parse("ID=void"),
        architecture: "x86_64".into(),
        packages: vec![named("jq")],
        ..Job::default()
    };
    let case = |answer| Case { name: "jq".into(), job: job.clone(), answer };
    let findings = check(&good, &[case(None)]);
    assert!(findings.to_string().contains("jq: no plan is stored yet"), "{findings}");
    let stored = answers(&InProcess(&good), &[case(None)]).unwrap().remove(0);
    let findings = check(&good, &[case(Some(stored.clone()))]);
    assert!(findings.is_fine(), "{findings}");
    let mut other = stored.unwrap();
    other.steps[0].argv[3] = "jk".into();
    let findings = check(&good, &[case(Some(Ok(other)))]);
    assert!(findings.to_string().contains("plan.steps[0].argv[3] is \"jq\"; it was \"jk\""), "{findings}");
}

#[test]
fn golden_plans_have_no_fields_with_defaults() {
    let step = |retries| Step {
        phase: Phase::Install,
        why: String::new(),
        argv: vec!["pkg".into()],
        env: [("A/B~C".into(), String::new())].into(),
        retries,
        before_retry: Vec::new(),
        network: retries > 0,
        also_good: Vec::new(),
        once: false,
        timeout: 0,
    };
    let expect = Expect { sound: vec!["ii".into()], ..Expect::default() };
    let plan = Plan { steps: vec![step(0), step(1)], expect, ..Plan::default() };
    let stored = without_defaults(&PlanAnswer::new(Ok(plan.clone())));
    let json = json!({"api": wire::API, "plan": {
        "expect": {"sound": ["ii"]},
        "steps": [
            {"phase": "install", "why": "", "argv": ["pkg"], "env": {"A/B~C": ""}, "timeout": 0},
            {"phase": "install", "why": "", "argv": ["pkg"], "env": {"A/B~C": ""}, "timeout": 0, "retries": 1, "network": true},
        ],
    }});
    assert_eq!(stored, json);
    assert_eq!(PlanAnswer::read(&stored.to_string()), Ok(Ok(plan)));
    let empty = PlanAnswer::new(Ok(Plan::default()));
    assert_eq!(without_defaults(&empty), json!({"api": wire::API, "plan": {}}));
}
