//! What holds for every answer of every plugin: oven looks at it before it executes anything, [`crate::check`] too.

use crate::{Claims, FILE_PLACES, Job, Phase, Plan, Shim, Step, Trouble};
use std::collections::BTreeSet;

/// A step that takes longer than a day hangs.
const MAX_TIMEOUT: u64 = 24 * 3600;
const MAX_RETRIES: u32 = 10;
/// Far more than any plan needs: a plugin that wants more has run away.
const MAX_PATHS: usize = 1000;
const MAX_STEPS: usize = 1000;
/// Of what is shown on one line.
const MAX_LINE: usize = 200;
/// File systems of the running kernel: nothing can be put there.
const KERNELS: [&str; 3] = ["/dev", "/proc", "/sys"];
/// What oven itself puts below `/run` for a step.
const OVENS: [&str; 3] = ["/run/oven/packages", "/run/oven/definition", "/run/oven/ca.pem"];
/// Documents of an image that are oven's own.
const OUR_FACTS: [&str; 1] = ["inputs.json"];

/// What is wrong with an answer to `claims`; nothing, if it is as it should be.
pub fn faults_of_claims(claims: &Claims) -> Vec<String> {
    let mut faults = Vec::new();
    for (key, paths) in [("look_for", &claims.look_for), ("read", &claims.read)] {
        if paths.len() > MAX_PATHS {
            faults.push(format!("{key}: {} paths; {MAX_PATHS} are allowed", paths.len()));
        }
        let wrong = paths.iter().filter_map(|path| Some(format!("{key}: {}", wrong_path(path)?)));
        faults.extend(wrong.take(MAX_PATHS));
    }
    faults
}

/// What is wrong with a plan for this job; nothing, if it is as it should be.
pub fn faults_of_plan(plan: &Plan, job: &Job) -> Vec<String> {
    let mut faults = Vec::new();
    files("shims", &plan.shims, &mut faults);
    files("files", &plan.files, &mut faults);
    let astray = |file: &&Shim| !FILE_PLACES.iter().any(|place| below(&file.path, place));
    for file in plan.files.iter().filter(astray) {
        faults.push(format!("files: {} is not below {}", file.path, FILE_PLACES.join(", ")));
    }
    if plan.steps.len() > MAX_STEPS {
        faults.push(format!("steps: {} of them; {MAX_STEPS} are allowed", plan.steps.len()));
    }
    for (index, step) in plan.steps.iter().enumerate().take(MAX_STEPS) {
        let mut wrong = Vec::new();
        self::step(step, job, &mut wrong);
        if index > 0 && plan.steps[index - 1].phase > step.phase {
            let (before, phase) = (word(plan.steps[index - 1].phase), word(step.phase));
            wrong.push(format!("{phase} after {before}: phases never go back"));
        }
        faults.extend(wrong.into_iter().map(|what| format!("steps[{index}]: {what}")));
    }
    for (name, argv) in &plan.facts {
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
            faults.push(format!("facts: {name:?} is no name: letters, digits, `.`, `_` and `-`"));
        } else if OUR_FACTS.contains(&name.as_str()) {
            faults.push(format!("facts: {name} is oven's own"));
        }
        command(&format!("facts: {name}"), argv, &mut faults);
    }
    let expects = !plan.expect.packages.is_empty() || !plan.expect.sound.is_empty();
    if expects && !plan.facts.contains_key("packages") {
        faults.push("expect: there is no fact `packages` that would show it".into());
    }
    if plan.expect.packages.iter().any(|wanted| wanted.name.is_empty()) {
        faults.push("expect: a package without a name".into());
    }
    for (key, troubles) in [("troubles", &plan.troubles), ("failures", &plan.failures)] {
        faults.extend(
            troubles
                .iter()
                .enumerate()
                .filter_map(|(index, trouble)| Some(format!("{key}[{index}]: {}", wrong_trouble(trouble)?))),
        );
    }
    faults
}

fn step(step: &Step, job: &Job, faults: &mut Vec<String>) {
    if let Some(wrong) = wrong_line(&step.why) {
        faults.push(format!("why {wrong}: it says what the step is for, such as `installing 3 packages`"));
    }
    command("argv", &step.argv, faults);
    if !step.before_retry.is_empty() {
        command("before_retry", &step.before_retry, faults);
        if step.retries == 0 {
            faults.push("before_retry without retries: it would never run".into());
        }
    }
    for (name, value) in &step.env {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) || !name.chars().all(plain) {
            faults.push(format!("env: {name:?} is not the name of a variable"));
        }
        if value.contains('\0') {
            faults.push(format!("env: {name} has a zero byte"));
        }
    }
    let phase = word(step.phase);
    match (step.phase, step.network) {
        (Phase::Fetch, false) => faults.push("a fetch step has the network: `network` has to be true".into()),
        (Phase::Fetch, true) | (_, false) => {}
        (Phase::Upgrade | Phase::Install, true) if job.network => {}
        (Phase::Upgrade | Phase::Install, true) => {
            faults.push(format!("{phase} with the network, and the job does not say `network`"));
        }
        (_, true) => faults.push(format!("{phase} with the network: only fetch steps have it")),
    }
    if step.timeout == 0 || step.timeout > MAX_TIMEOUT {
        faults.push(format!("timeout: {} seconds; 1 to {MAX_TIMEOUT} are sensible", step.timeout));
    }
    if step.retries > MAX_RETRIES {
        faults.push(format!("retries: {}; {MAX_RETRIES} are enough", step.retries));
    }
}

fn command(what: &str, argv: &[String], faults: &mut Vec<String>) {
    match argv.first().map(String::as_str) {
        None | Some("") => faults.push(format!("{what}: there is no program")),
        Some(program) if program.contains('/') => {
            faults.extend(wrong_path(program).map(|wrong| format!("{what}: {wrong}")));
        }
        Some(program) if program.starts_with('-') || program.chars().any(char::is_whitespace) => {
            let hint = "a program and its arguments are elements of their own, no shell reads them";
            faults.push(format!("{what}: {program:?} is no program: {hint}"));
        }
        Some(_) => {}
    }
    if argv.iter().any(|argument| argument.contains('\0')) {
        faults.push(format!("{what}: a zero byte"));
    }
}

fn files(key: &str, files: &[Shim], faults: &mut Vec<String>) {
    if files.len() > MAX_PATHS {
        faults.push(format!("{key}: {} of them; {MAX_PATHS} are allowed", files.len()));
    }
    let mut seen = BTreeSet::new();
    for file in files.iter().take(MAX_PATHS) {
        let path = &file.path;
        if let Some(wrong) = wrong_path(path) {
            faults.push(format!("{key}: {wrong}"));
        } else if let Some(kernels) = KERNELS.iter().find(|dir| below(path, dir)) {
            faults.push(format!("{key}: {path}: {kernels} is the kernel's"));
        } else if OVENS.iter().any(|dir| below(path, dir)) {
            faults.push(format!("{key}: {path} is oven's own"));
        } else if !seen.insert(path) {
            faults.push(format!("{key}: {path} is there twice"));
        }
        if file.mode > 0o777 {
            faults.push(format!("{key}: {path}: mode {:#o}: permission bits are 0 to 0o777", file.mode));
        }
    }
}

fn wrong_trouble(trouble: &Trouble) -> Option<String> {
    if trouble.output.trim_matches(['*', ' ']).is_empty() {
        return Some("output is empty, or fits every line".into());
    }
    if trouble.means.trim().is_empty() {
        return Some("means is empty".into());
    }
    let stars = trouble.output.matches('*').count();
    let texts = [Some(&trouble.means), trouble.hint.as_ref(), trouble.package.as_ref()];
    let named = |n: usize| texts.iter().flatten().any(|text| text.contains(&format!("{{{n}}}")));
    let lost = (stars + 1..=9).find(|n| named(*n))?;
    Some(format!("{{{lost}}} stands for nothing: output has {stars} `*`"))
}

/// What is wrong with an absolute path in the image, as a sentence that begins with the path.
fn wrong_path(path: &str) -> Option<String> {
    let wrong = if !path.starts_with('/') {
        "is not absolute: a path in the image begins with `/`"
    } else if path.chars().any(char::is_control) {
        "has a control character"
    } else if path == "/" {
        "is the root of the image"
    } else if path[1..].split('/').any(|part| ["", ".", ".."].contains(&part)) {
        "is not plain: no `..`, `.`, `//` or `/` at its end"
    } else {
        return None;
    };
    Some(format!("{path:?} {wrong}"))
}

/// What is wrong with a text that is shown on a line of its own.
pub(crate) fn wrong_line(text: &str) -> Option<String> {
    if text.trim().is_empty() {
        Some("is empty".into())
    } else if text.chars().any(char::is_control) {
        Some("is not one line".into())
    } else if text.chars().count() > MAX_LINE {
        Some(format!("is longer than {MAX_LINE} characters"))
    } else {
        None
    }
}

/// Whether a path is a directory, or in it.
fn below(path: &str, dir: &str) -> bool {
    path.strip_prefix(dir).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn word(phase: Phase) -> &'static str {
    match phase {
        Phase::Prepare => "prepare",
        Phase::Fetch => "fetch",
        Phase::Upgrade => "upgrade",
        Phase::Install => "install",
        Phase::Verify => "verify",
        Phase::Clean => "clean",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Expect, Wanted};

    fn fine() -> Step {
        Step {
            phase: Phase::Install,
            why: "installing 1 package".into(),
            argv: vec!["pkg".into(), "add".into(), "tree".into()],
            env: [("LC_ALL".to_owned(), "C".to_owned())].into(),
            retries: 0,
            before_retry: Vec::new(),
            network: false,
            timeout: 60,
        }
    }

    fn faults(change: impl FnOnce(&mut Plan)) -> String {
        let mut plan = Plan { steps: vec![fine()], ..Plan::default() };
        change(&mut plan);
        faults_of_plan(&plan, &Job::default()).join("\n")
    }

    fn step_faults(change: impl FnOnce(&mut Step)) -> String {
        faults(|plan| change(&mut plan.steps[0]))
    }

    #[test]
    fn a_plan_as_it_should_be() {
        assert_eq!(faults(|_| ()), "");
        let fetch = |step: &mut Step| (step.phase, step.network) = (Phase::Fetch, true);
        assert_eq!(step_faults(fetch), "");
        let job = Job { network: true, ..Job::default() };
        let plan = Plan { steps: vec![Step { network: true, ..fine() }], ..Plan::default() };
        assert_eq!(faults_of_plan(&plan, &job), Vec::<String>::new());
    }

    #[test]
    fn steps() {
        assert!(step_faults(|s| s.why = "a\nb".into()).contains("steps[0]: why is not one line"));
        assert!(step_faults(|s| s.why.clear()).contains("why is empty"));
        assert!(step_faults(|s| s.argv.clear()).contains("no program"));
        assert!(step_faults(|s| s.argv[0] = "pkg add tree".into()).contains("no shell"));
        assert!(step_faults(|s| s.argv[0] = "../bin/pkg".into()).contains("not absolute"));
        assert!(step_faults(|s| s.argv[1] = "a\0b".into()).contains("zero byte"));
        assert!(step_faults(|s| _ = s.env.insert("A=B".into(), "x".into())).contains("variable"));
        assert!(step_faults(|s| s.timeout = 0).contains("timeout"));
        assert!(step_faults(|s| s.timeout = 1_000_000).contains("timeout"));
        assert!(step_faults(|s| s.retries = 1000).contains("retries"));
        assert!(step_faults(|s| s.before_retry = vec!["true".into()]).contains("would never run"));
        assert!(step_faults(|s| s.network = true).contains("does not say `network`"));
        assert!(step_faults(|s| (s.phase, s.network) = (Phase::Clean, true)).contains("only fetch steps"));
        assert!(step_faults(|s| s.phase = Phase::Fetch).contains("has to be true"));
        let back = faults(|plan| plan.steps.push(Step { phase: Phase::Prepare, ..fine() }));
        assert!(back.contains("steps[1]: prepare after install"), "{back}");
    }

    #[test]
    fn paths_stay_inside() {
        let shim = |path: &str, mode: u32| {
            let shim = Shim { path: path.into(), content: String::new(), mode };
            faults(|plan| plan.shims.push(shim))
        };
        assert_eq!(shim("/etc/pkg.conf", 0o644), "");
        assert_eq!(shim("/run/oven/pkg.conf", 0o644), "");
        for path in ["etc/x", "/etc/../x", "/etc//x", "/etc/", "/", "", "/a\nb", "/etc/./x"] {
            assert!(shim(path, 0o644).contains("shims: "), "{path}");
        }
        for path in ["/proc/sys/x", "/dev/null", "/sys/x", "/run/oven/packages/x", "/run/oven/ca.pem"] {
            assert!(shim(path, 0o644).contains(path), "{path}");
        }
        assert!(shim("/etc/x", 0o4755).contains("0o4755"));
        let claims =
            Claims { look_for: vec!["bin/pkg".into()], read: vec!["/../x".into()], ..Claims::default() };
        assert_eq!(faults_of_claims(&claims).len(), 2);
    }

    #[test]
    fn files_facts_and_troubles() {
        let file = Shim { path: "/run/x".into(), content: String::new(), mode: 0o644 };
        assert!(faults(|plan| plan.files = vec![file.clone()]).contains("is not below /etc"));
        let file = Shim { path: "/etc/x".into(), ..file };
        assert!(faults(|plan| plan.files = vec![file.clone(), file]).contains("twice"));
        for name in ["", "../x", "a b", ".x", "inputs.json"] {
            assert!(faults(|plan| _ = plan.facts.insert(name.into(), vec!["true".into()])).contains("facts"));
        }
        let wanted = Wanted { name: "tree".into(), architecture: None, version: None };
        let expect = Expect { packages: vec![wanted], ..Expect::default() };
        assert!(faults(|plan| plan.expect = expect).contains("no fact `packages`"));
        let trouble = |output: &str, means: &str| {
            let (output, means) = (output.to_owned(), means.to_owned());
            faults(|plan| plan.troubles = vec![Trouble { output, means, hint: None, package: None }])
        };
        assert_eq!(trouble("E: no *", "no {1}"), "");
        assert!(trouble("E: no *", "no {2}").contains("{2} stands for nothing"));
        assert!(trouble("*", "no").contains("fits every line"));
        assert!(trouble("E", "").contains("means is empty"));
    }
}
