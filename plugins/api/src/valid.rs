//! What holds for every answer of every plugin: oven looks at it before it executes anything, [`crate::check()`] too.

use crate::{CACHE_PLACES, Cache, Claims, FILE_PLACES, Job, Phase, Plan, Shim, Step, Tools, Trouble};
use std::collections::{BTreeMap, BTreeSet};

/// A step that takes longer than a day hangs.
const MAX_TIMEOUT: u64 = 24 * 3600;
const MAX_RETRIES: u32 = 10;
/// Far more than any plan needs: a plugin that wants more has run away.
const MAX_PATHS: usize = 1000;
const MAX_STEPS: usize = 1000;
/// A package manager has two or three.
const MAX_CACHES: usize = 16;
/// A package manager's database is no cache.
const DATABASES: [&str; 4] = ["/var/lib/apt", "/var/lib/dpkg", "/var/lib/rpm", "/var/lib/pacman"];
/// Of a file that stays: only root writes it.
const MAX_MODE: u32 = 0o755;
/// Bytes of a file that stays: what is larger is no configuration.
const MAX_CONTENT: usize = 4 << 20;
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
    for file in plan.files.iter().take(MAX_PATHS) {
        let Shim { path, content, mode } = file;
        if !FILE_PLACES.iter().any(|place| path != place && below(path, place)) {
            faults.push(format!("files: {path} is not below {}", FILE_PLACES.join(", ")));
        }
        if mode & !MAX_MODE != 0 {
            faults.push(format!("files: {path}: mode {mode:#o}: {MAX_MODE:#o} is the most, for it stays"));
        }
        if content.len() > MAX_CONTENT {
            faults.push(format!("files: {path}: is larger than {} MiB", MAX_CONTENT >> 20));
        }
    }
    caches(plan, &mut faults);
    steps("steps", &plan.steps, job, &mut faults);
    if let Some(tools) = &plan.tools {
        self::tools(tools, plan, job, &mut faults);
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
    let heard = [("troubles", &plan.troubles), ("failures", &plan.failures), ("notes", &plan.notes)];
    for (key, troubles) in heard {
        faults.extend(
            troubles
                .iter()
                .enumerate()
                .filter_map(|(index, trouble)| Some(format!("{key}[{index}]: {}", wrong_trouble(trouble)?))),
        );
    }
    faults
}

fn steps(key: &str, steps: &[Step], job: &Job, faults: &mut Vec<String>) {
    if steps.len() > MAX_STEPS {
        faults.push(format!("{key}: {} of them; {MAX_STEPS} are allowed", steps.len()));
    }
    for (index, step) in steps.iter().enumerate().take(MAX_STEPS) {
        let mut wrong = Vec::new();
        self::step(step, job, &mut wrong);
        if index > 0 && steps[index - 1].phase > step.phase {
            let (before, phase) = (word(steps[index - 1].phase), word(step.phase));
            wrong.push(format!("{phase} after {before}: phases never go back"));
        }
        faults.extend(wrong.into_iter().map(|what| format!("{key}[{index}]: {what}")));
    }
}

fn tools(tools: &Tools, plan: &Plan, job: &Job, faults: &mut Vec<String>) {
    let Tools { steps, unneeded, remove } = tools;
    if job.tools.is_empty() {
        faults.push("tools: the job asks for none".into());
    }
    if !plan.facts.contains_key("packages") {
        faults.push("tools: there is no fact `packages` that would show what came".into());
    }
    for (key, steps, empty) in
        [("tools.steps", steps, "nothing installs them"), ("tools.remove", remove, "they would stay")]
    {
        self::steps(key, steps, job, faults);
        if steps.is_empty() {
            faults.push(format!("{key}: {empty}"));
        }
    }
    for step in steps.iter().filter(|step| ![Phase::Fetch, Phase::Install].contains(&step.phase)) {
        faults.push(format!("tools.steps: {} is neither fetch nor install", word(step.phase)));
    }
    if remove.iter().any(|step| step.network) {
        faults.push("tools.remove: with the network: nothing is downloaded to remove packages".into());
    }
    let names = |step: &Step| step.argv.iter().any(|argument| argument.contains("{name}"));
    if !remove.is_empty() && !remove.iter().any(names) {
        faults.push("tools.remove: no argument has `{name}`: what came is removed, and nothing else".into());
    }
    command("tools.unneeded", &unneeded.argv, faults);
    variables(&unneeded.env, &mut |what| faults.push(format!("tools.unneeded: {what}")));
    if !unneeded.output.contains('*') {
        faults.push("tools.unneeded: output has no `*`, which stands for a package's name".into());
    }
}

fn variables(env: &BTreeMap<String, String>, fault: &mut dyn FnMut(String)) {
    for (name, value) in env {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) || !name.chars().all(plain) {
            fault(format!("env: {name:?} is not the name of a variable"));
        }
        if value.contains('\0') {
            fault(format!("env: {name} has a zero byte"));
        }
    }
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
    variables(&step.env, &mut |what| faults.push(what));
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
    if step.once && step.phase != Phase::Fetch {
        faults.push(format!("once: for fetch steps, and this is {phase}"));
    }
    if step.also_good.contains(&0) {
        faults.push("also_good: 0 always is".into());
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

fn caches(plan: &Plan, faults: &mut Vec<String>) {
    if plan.caches.len() > MAX_CACHES {
        faults.push(format!("caches: {} of them; {MAX_CACHES} are allowed", plan.caches.len()));
    }
    for (index, Cache { path, sources, .. }) in plan.caches.iter().enumerate().take(MAX_CACHES) {
        let mut wrong = |what: String| faults.push(format!("caches: {what}"));
        if let Some(what) = wrong_path(path) {
            wrong(what);
        } else if !CACHE_PLACES.iter().any(|place| path != place && below(path, place)) {
            wrong(format!("{path} is not below {}", CACHE_PLACES.join(", ")));
        } else if DATABASES.contains(&path.as_str()) {
            wrong(format!("{path} holds what is installed"));
        }
        let before = plan.caches[..index].iter().map(|cache| &cache.path);
        let files = plan.shims.iter().chain(&plan.files).map(|file| &file.path);
        if let Some(other) = before.chain(files).find(|other| below(path, other) || below(other, path)) {
            wrong(format!("{path} and {other}: one is inside of the other"));
        }
        if sources.is_empty() {
            wrong(format!("{path}: there are no sources, which would tell one image's from another's"));
        }
        if sources.len() > MAX_PATHS {
            wrong(format!("{path}: {} sources; {MAX_PATHS} are allowed", sources.len()));
        }
        sources.iter().take(MAX_PATHS).filter_map(|source| wrong_path(source)).for_each(wrong);
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
mod tests;
