//! Validates the answers of plugins. oven does this before it executes anything. [`crate::check()`] uses the same
//! rules.

use crate::{
    CACHE_PLACES, Cache, Claims, FILE_PLACES, Job, Phase, Plan, ProgressLine, Shim, Step, Tools, Trouble,
};
use std::collections::{BTreeMap, BTreeSet};

/// The longest time limit of a step, in seconds. A step that takes longer than a day is assumed to hang.
const MAX_TIMEOUT: u64 = 24 * 3600;
const MAX_RETRIES: u32 = 10;
/// The maximal number of paths in a list. Plans need far fewer paths. A longer list is a bug of the plugin.
const MAX_PATHS: usize = 1000;
/// The maximal number of steps in a list.
const MAX_STEPS: usize = 1000;
/// The maximal number of lines that say how far a step is. Each line of output is compared with all of them.
const MAX_PROGRESS: usize = 100;
/// The maximal number of caches. A package manager has only two or three.
const MAX_CACHES: usize = 16;
/// Directories of package managers' databases, which are not caches.
const DATABASES: [&str; 4] = ["/var/lib/apt", "/var/lib/dpkg", "/var/lib/rpm", "/var/lib/pacman"];
/// The permissions that are allowed for a file which stays in the image. Only root may write to such a file.
const MAX_MODE: u32 = 0o755;
/// The maximal size of a file that stays in the image, in bytes. A larger file is not configuration.
const MAX_CONTENT: usize = 4 << 20;
/// The maximal length of a text that is shown on one line, in characters.
const MAX_LINE: usize = 200;
/// Directories with file systems of the running kernel. No file can be written there.
const KERNEL_DIRS: [&str; 3] = ["/dev", "/proc", "/sys"];
/// Paths that oven itself creates below `/run` in a step.
const RESERVED: [&str; 3] = ["/run/oven/packages", "/run/oven/definition", "/run/oven/ca.pem"];
/// Names that no fact of a plan may have, because oven itself stores data with an image under these names. A fact is a
/// command whose output is stored with the image.
const RESERVED_FACTS: [&str; 1] = ["inputs.json"];

/// Returns the faults of an answer to `claims`; empty if the answer is valid.
pub fn faults_of_claims(claims: &Claims) -> Vec<String> {
    let mut faults = Vec::new();
    for (key, paths) in [("look_for", &claims.look_for), ("read", &claims.read)] {
        if paths.len() > MAX_PATHS {
            faults.push(format!("{key}: {} paths; at most {MAX_PATHS} are allowed", paths.len()));
        }
        let wrong = paths.iter().filter_map(|path| Some(format!("{key}: {}", path_fault(path)?)));
        faults.extend(wrong.take(MAX_PATHS));
    }
    faults
}

/// Returns the faults of a plan for this job; empty if the plan is valid.
pub fn faults_of_plan(plan: &Plan, job: &Job) -> Vec<String> {
    let mut faults = Vec::new();
    check_files("shims", &plan.shims, &mut faults);
    check_files("files", &plan.files, &mut faults);
    for file in plan.files.iter().take(MAX_PATHS) {
        let Shim { path, content, mode } = file;
        if !FILE_PLACES.iter().any(|place| path != place && is_below(path, place)) {
            faults.push(format!("files: {path} is not below {}", FILE_PLACES.join(", ")));
        }
        if mode & !MAX_MODE != 0 {
            faults.push(format!(
                "files: {path}: mode {mode:#o}: at most {MAX_MODE:#o} is allowed, because the file stays in the image"
            ));
        }
        if content.len() > MAX_CONTENT {
            faults.push(format!("files: {path}: is larger than {} MiB", MAX_CONTENT >> 20));
        }
    }
    check_caches(plan, &mut faults);
    check_steps("steps", &plan.steps, job, &mut faults);
    if let Some(tools) = &plan.tools {
        check_tools(tools, plan, job, &mut faults);
    }
    for (name, argv) in &plan.facts {
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
            faults
                .push(format!("facts: {name:?} is not a valid name: use letters, digits, `.`, `_` and `-`"));
        } else if RESERVED_FACTS.contains(&name.as_str()) {
            faults.push(format!("facts: {name} is reserved for oven"));
        }
        check_command(&format!("facts: {name}"), argv, &mut faults);
    }
    let expects = !plan.expect.packages.is_empty() || !plan.expect.sound.is_empty();
    if expects && !plan.facts.contains_key("packages") {
        faults.push("expect: oven checks it with the fact `packages`, which is missing".into());
    }
    if plan.expect.packages.iter().any(|wanted| wanted.name.is_empty()) {
        faults.push("expect: a package has no name".into());
    }
    if !plan.versions.is_empty() {
        check_command("versions", &plan.versions, &mut faults);
        if !plan.versions.iter().any(|argument| argument.contains("{name}")) {
            faults.push("versions: no argument has {name}, which stands for the package".into());
        }
    }
    let lists = [("troubles", &plan.troubles), ("failures", &plan.failures), ("notes", &plan.notes)];
    for (key, troubles) in lists {
        faults.extend(
            troubles
                .iter()
                .enumerate()
                .filter_map(|(index, trouble)| Some(format!("{key}[{index}]: {}", trouble_fault(trouble)?))),
        );
    }
    if plan.progress.len() > MAX_PROGRESS {
        faults.push(format!("progress: {} entries; at most {MAX_PROGRESS} are allowed", plan.progress.len()));
    }
    let lines = plan.progress.iter().take(MAX_PROGRESS).enumerate();
    faults.extend(
        lines.filter_map(|(index, line)| Some(format!("progress[{index}]: {}", progress_fault(line)?))),
    );
    faults
}

fn check_steps(key: &str, steps: &[Step], job: &Job, faults: &mut Vec<String>) {
    if steps.len() > MAX_STEPS {
        faults.push(format!("{key}: {} entries; at most {MAX_STEPS} are allowed", steps.len()));
    }
    for (index, step) in steps.iter().enumerate().take(MAX_STEPS) {
        let mut wrong = Vec::new();
        check_step(step, job, &mut wrong);
        if index > 0 && steps[index - 1].phase > step.phase {
            let (before, phase) = (phase_name(steps[index - 1].phase), phase_name(step.phase));
            wrong.push(format!("{phase} after {before}: phases never go back"));
        }
        faults.extend(wrong.into_iter().map(|what| format!("{key}[{index}]: {what}")));
    }
}

fn check_tools(tools: &Tools, plan: &Plan, job: &Job, faults: &mut Vec<String>) {
    let Tools { steps, unneeded, remove } = tools;
    if job.tools.is_empty() {
        faults.push("tools: the job does not need any tools".into());
    }
    if !plan.facts.contains_key("packages") {
        faults.push(
            "tools: the fact `packages` is missing; oven needs it to find out which packages were installed"
                .into(),
        );
    }
    for (key, steps, empty) in [
        ("tools.steps", steps, "it is empty, so nothing is installed"),
        ("tools.remove", remove, "it is empty, so the tools would stay"),
    ] {
        check_steps(key, steps, job, faults);
        if steps.is_empty() {
            faults.push(format!("{key}: {empty}"));
        }
    }
    for step in steps.iter().filter(|step| ![Phase::Fetch, Phase::Install].contains(&step.phase)) {
        faults.push(format!(
            "tools.steps: a step has phase {}, which is neither fetch nor install",
            phase_name(step.phase)
        ));
    }
    if remove.iter().any(|step| step.network) {
        faults.push("tools.remove: a step has `network`, but removing packages needs no network".into());
    }
    let names = |step: &Step| step.argv.iter().any(|argument| argument.contains("{name}"));
    if !remove.is_empty() && !remove.iter().any(names) {
        faults.push(
            "tools.remove: no argument contains `{name}`, which stands for the package to remove".into(),
        );
    }
    check_command("tools.unneeded", &unneeded.argv, faults);
    check_variables(&unneeded.env, &mut |what| faults.push(format!("tools.unneeded: {what}")));
    if !unneeded.output.contains('*') {
        faults.push("tools.unneeded: output needs a `*`, which stands for a package's name".into());
    }
}

fn check_variables(env: &BTreeMap<String, String>, fault: &mut dyn FnMut(String)) {
    for (name, value) in env {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) || !name.chars().all(plain) {
            fault(format!("env: {name:?} is not a valid variable name"));
        }
        if value.contains('\0') {
            fault(format!("env: the value of {name} has a zero byte"));
        }
    }
}

fn check_step(step: &Step, job: &Job, faults: &mut Vec<String>) {
    if let Some(wrong) = line_fault(&step.why) {
        faults.push(format!("why {wrong}: it must say what the step does, such as `installing 3 packages`"));
    }
    check_command("argv", &step.argv, faults);
    if !step.before_retry.is_empty() {
        check_command("before_retry", &step.before_retry, faults);
        if step.retries == 0 {
            faults.push("before_retry would never run, because `retries` is 0".into());
        }
    }
    check_variables(&step.env, &mut |what| faults.push(what));
    let phase = phase_name(step.phase);
    match (step.phase, step.network) {
        (Phase::Fetch, false) => faults.push("`network` must be true in a fetch step".into()),
        (Phase::Fetch, true) | (_, false) => {}
        (Phase::Upgrade | Phase::Install, true) if job.network => {}
        (Phase::Upgrade | Phase::Install, true) => {
            faults.push(format!("a step of phase {phase} has `network`, but the job does not set `network`"));
        }
        (_, true) => {
            faults.push(format!("a step of phase {phase} has `network`, but only fetch steps may have it"))
        }
    }
    if step.timeout == 0 || step.timeout > MAX_TIMEOUT {
        faults.push(format!("timeout: {} seconds; 1 to {MAX_TIMEOUT} are allowed", step.timeout));
    }
    if step.once && step.phase != Phase::Fetch {
        faults.push(format!("once: it is only for fetch steps, but this step has phase {phase}"));
    }
    if step.also_good.contains(&0) {
        faults.push("also_good: leave out 0, which always means success".into());
    }
    if step.retries > MAX_RETRIES {
        faults.push(format!("retries: {}; at most {MAX_RETRIES} are allowed", step.retries));
    }
}

fn check_command(what: &str, argv: &[String], faults: &mut Vec<String>) {
    match argv.first().map(String::as_str) {
        None | Some("") => faults.push(format!("{what}: it names no program")),
        Some(program) if program.contains('/') => {
            faults.extend(path_fault(program).map(|wrong| format!("{what}: {wrong}")));
        }
        Some(program) if program.starts_with('-') || program.chars().any(char::is_whitespace) => {
            let hint = "the program and each argument are separate elements, because no shell is involved";
            faults.push(format!("{what}: {program:?} is not a program: {hint}"));
        }
        Some(_) => {}
    }
    if argv.iter().any(|argument| argument.contains('\0')) {
        faults.push(format!("{what}: an argument has a zero byte"));
    }
}

fn check_files(key: &str, files: &[Shim], faults: &mut Vec<String>) {
    if files.len() > MAX_PATHS {
        faults.push(format!("{key}: {} entries; at most {MAX_PATHS} are allowed", files.len()));
    }
    let mut seen = BTreeSet::new();
    for file in files.iter().take(MAX_PATHS) {
        let path = &file.path;
        if let Some(wrong) = path_fault(path) {
            faults.push(format!("{key}: {wrong}"));
        } else if let Some(dir) = KERNEL_DIRS.iter().find(|dir| is_below(path, dir)) {
            faults.push(format!("{key}: {path}: {dir} is a file system of the kernel"));
        } else if RESERVED.iter().any(|dir| is_below(path, dir)) {
            faults.push(format!("{key}: {path} is reserved for oven"));
        } else if !seen.insert(path) {
            faults.push(format!("{key}: {path} is listed twice"));
        }
        if file.mode > 0o777 {
            faults.push(format!("{key}: {path}: mode {:#o}: permission bits are 0 to 0o777", file.mode));
        }
    }
}

fn check_caches(plan: &Plan, faults: &mut Vec<String>) {
    if plan.caches.len() > MAX_CACHES {
        faults.push(format!("caches: {} entries; at most {MAX_CACHES} are allowed", plan.caches.len()));
    }
    for (index, Cache { path, sources, .. }) in plan.caches.iter().enumerate().take(MAX_CACHES) {
        let mut wrong = |what: String| faults.push(format!("caches: {what}"));
        if let Some(what) = path_fault(path) {
            wrong(what);
        } else if !CACHE_PLACES.iter().any(|place| path != place && is_below(path, place)) {
            wrong(format!("{path} is not below {}", CACHE_PLACES.join(", ")));
        } else if DATABASES.contains(&path.as_str()) {
            wrong(format!("{path} is the package manager's database, not a cache"));
        }
        let before = plan.caches[..index].iter().map(|cache| &cache.path);
        let files = plan.shims.iter().chain(&plan.files).map(|file| &file.path);
        if let Some(other) = before.chain(files).find(|other| is_below(path, other) || is_below(other, path))
        {
            wrong(format!("{path} and {other}: one contains the other"));
        }
        if sources.len() > MAX_PATHS {
            wrong(format!("{path}: {} sources; at most {MAX_PATHS} are allowed", sources.len()));
        }
        sources.iter().take(MAX_PATHS).filter_map(|source| path_fault(source)).for_each(wrong);
    }
}

fn trouble_fault(trouble: &Trouble) -> Option<String> {
    if trouble.output.trim_matches(['*', ' ']).is_empty() {
        return Some("output is empty, or matches every line".into());
    }
    if trouble.means.trim().is_empty() {
        return Some("means is empty".into());
    }
    lost_star(&trouble.output, &[Some(&trouble.means), trouble.hint.as_ref(), trouble.package.as_ref()])
}

fn progress_fault(line: &ProgressLine) -> Option<String> {
    let ProgressLine { output, phases: _, done, total, unit, bytes, total_bytes, percent, name } = line;
    if output.trim_matches(['*', ' ']).is_empty() {
        return Some("output is empty, or matches every line".into());
    }
    let texts = [done, total, unit, bytes, total_bytes, percent, name].map(Option::as_ref);
    if texts.iter().all(Option::is_none) {
        return Some("it says nothing: give `done`, `bytes`, `percent`, `name` or a total".into());
    }
    lost_star(output, &texts)
}

/// Returns what is wrong if a text has a number in braces for which the pattern has no `*`.
fn lost_star(output: &str, texts: &[Option<&String>]) -> Option<String> {
    let stars = output.matches('*').count();
    let uses = |n: usize| texts.iter().flatten().any(|text| text.contains(&format!("{{{n}}}")));
    let lost = (stars + 1..=9).find(|n| uses(*n))?;
    Some(format!("{{{lost}}} has no `*`: `output` has only {stars}"))
}

/// Returns what is wrong with a path in the image, or `None`. The text begins with the path.
fn path_fault(path: &str) -> Option<String> {
    let wrong = if !path.starts_with('/') {
        "is not absolute: a path in the image begins with `/`"
    } else if path.chars().any(char::is_control) {
        "has a control character"
    } else if path == "/" {
        "is the root of the image"
    } else if path[1..].split('/').any(|part| ["", ".", ".."].contains(&part)) {
        "is not normalized: remove `..`, `.`, `//` and a `/` at the end"
    } else {
        return None;
    };
    Some(format!("{path:?} {wrong}"))
}

/// Returns what is wrong with a text that is shown on one line, or `None`.
pub(crate) fn line_fault(text: &str) -> Option<String> {
    if text.trim().is_empty() {
        Some("is empty".into())
    } else if text.chars().any(char::is_control) {
        Some("has control characters".into())
    } else if text.chars().count() > MAX_LINE {
        Some(format!("is longer than {MAX_LINE} characters"))
    } else {
        None
    }
}

/// Whether `path` is `dir` or lies below it.
fn is_below(path: &str, dir: &str) -> bool {
    path.strip_prefix(dir).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn phase_name(phase: Phase) -> &'static str {
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
