//! `oven plugin`, and `oven plan --os-release`.

mod golden;
mod skeleton;

use super::{End, answer, print_raw};
use crate::bake::target;
use crate::cli::args;
use crate::cli::args::GlobalArgs;
use crate::config::project::Settings;
use crate::definition::PackageRequest;
use crate::definition::graph::BakeOrder;
use crate::distros::{KnownPlugin, Origin, PluginRegistry};
use crate::error::{Kind, SUCCESS};
use crate::ids::Architecture;
use crate::provision::programs;
use crate::provision::scripts;
use crate::report::{Report, TextStyle};
use crate::site;
use crate::text::{escape_json, escape_name, without_control_characters};
use anyhow::Result;
use oven_distro::check::{self, Rule};
use oven_distro::wire::PlanRequest;
use oven_distro::{Claim, Job, OsRelease};
use serde_json::{Value, json};
use std::path::Path;

pub fn run(global: &GlobalArgs, args: &args::PluginVerb, report: &Report) -> Result<End> {
    match args {
        args::PluginVerb::List => list(global, report),
        args::PluginVerb::Check(args) => check_all(global, args, report),
        args::PluginVerb::New(args) => {
            let made = skeleton::write(Path::new("."), args)?;
            if !global.json {
                made.iter().for_each(|path| answer(escape_name(path)));
            }
            report.note(format!("oven plugin check {}", made[0].display()));
            Ok(End::success(
                json!({"files": made.iter().map(|path| path.to_string_lossy()).collect::<Vec<_>>()}),
            ))
        }
    }
}

fn list(global: &GlobalArgs, report: &Report) -> Result<End> {
    let registry = site::plugins(&global.plugin, &site::helper()?)?;
    let mut objects = Vec::new();
    for known in registry.known() {
        let claims = claims_of(known);
        if !global.json {
            answer(format!("{}  ({})", known.id, known.origin));
            match &claims {
                Ok(claims) => {
                    claims.iter().for_each(|(word, names)| answer(format!("  {word}: {}", names.join(", "))))
                }
                Err(error) => answer(format!("  {error:#}")),
            }
        }
        report_containment(known, report);
        let mut object =
            json!({"id": known.id, "origin": known.origin.to_string(), "sha256": known.digest()});
        match claims {
            Ok(claims) => {
                object["claims"] =
                    claims.into_iter().map(|(word, names)| (word.to_owned(), json!(names))).collect()
            }
            Err(error) => object["error"] = json!(format!("{error:#}")),
        }
        objects.push(object);
    }
    let passed_over = registry.refused().iter();
    let passed_over: Vec<_> =
        passed_over.map(|(path, why)| json!({"path": path.to_string_lossy(), "why": why})).collect();
    if !global.json {
        let lines = registry.refused().iter();
        lines.for_each(|(path, why)| answer(format!("{} is not used: it {why}", escape_name(path))));
    }
    Ok(End::success(json!({"plugins": objects, "passed_over": passed_over})))
}

/// The claims of a plugin on widely known systems.
fn claims_of(known: &KnownPlugin) -> Result<Vec<(&'static str, Vec<String>)>> {
    let mut claims = vec![("exact", Vec::new()), ("family", Vec::new())];
    for (name, os) in check::systems() {
        match known.claims(&os)?.claim {
            Claim::Exact => claims[0].1.push(name),
            Claim::Family => claims[1].1.push(name),
            Claim::No => {}
        }
    }
    claims.retain(|(_, names)| !names.is_empty());
    Ok(claims)
}

fn report_containment(known: &KnownPlugin, report: &Report) {
    if let Some(why) = known.missing_sandbox_reason() {
        report
            .note(format!("the plugin {} ran without a sandbox, with all your permissions: {why}", known.id));
    }
}

fn check_all(global: &GlobalArgs, args: &args::PluginCheckArgs, report: &Report) -> Result<End> {
    let helper = site::helper()?;
    let (all, spelt) = (site::plugins(&global.plugin, &helper)?, args.what.display().to_string());
    let alone;
    let known = match all.known().iter().find(|known| known.id == spelt) {
        Some(known) if !args.what.exists() => known,
        _ => {
            alone = PluginRegistry::with_only(&args.what, &helper)?;
            &alone.known()[0]
        }
    };
    let dir = args.golden.clone().unwrap_or_else(|| args.what.with_extension("golden"));
    let mut cases = golden::read(&dir, args.golden.is_some())?;
    if args.bless {
        let written = golden::bless(&dir, &mut cases, &*known.speaker())?;
        written.iter().for_each(|path| report.note(format!("wrote {}", escape_name(path))));
    }
    let findings = check::check_speaker(&*known.speaker(), &cases);
    let (mut rules, mut faults) = (Vec::new(), 0);
    for rule in Rule::ALL {
        let broken: Vec<_> = findings.of(rule).map(without_control_characters).collect();
        let tried = !findings.incomplete || !broken.is_empty();
        if rule == Rule::Golden && cases.is_empty() {
            continue;
        }
        if !global.json {
            let word = match (broken.is_empty(), tried) {
                (true, true) => report.screen().paint(TextStyle::Green, "ok     "),
                (true, false) => "untried".to_owned(),
                _ => report.screen().paint(TextStyle::Red, "FAILED "),
            };
            print_raw(format!("{word} {rule}"));
            broken
                .iter()
                .for_each(|fault| answer(format!("          {}", fault.replace('\n', "\n            "))));
        }
        faults += broken.len();
        rules.push(json!({"rule": rule.to_string(), "tried": tried, "faults": broken}));
    }
    report_containment(known, report);
    if !global.json {
        let word = if faults == 1 { "fault" } else { "faults" };
        match (faults, cases.len()) {
            (0, 0) => answer(format!("{spelt} conforms; it has no golden plans yet")),
            (0, n) => answer(format!("{spelt} conforms; golden plans: {n}")),
            _ => answer(format!("{spelt} has {faults} {word}")),
        }
    }
    let code = if faults == 0 { SUCCESS } else { Kind::Definition as u8 };
    Ok(End { code, result: json!({"plugin": spelt, "conforms": faults == 0, "rules": rules}) })
}

/// `oven plan --os-release`: prints a plugin's plan for an image that the command line describes.
pub fn plan(global: &GlobalArgs, args: &args::PlanArgs, report: &Report) -> Result<End> {
    let flags = &args.os_release_plan;
    let file = flags.os_release.as_deref().unwrap_or(Path::new("/etc/os-release"));
    let read = |what: &str, file: &Path| {
        std::fs::read_to_string(file)
            .map_err(|error| Kind::Usage.error(format!("cannot read {what} {}: {error}", file.display())))
    };
    let os_release = OsRelease::parse(&read("the os-release file", file)?);
    let image = match &args.definitions[..] {
        [] => None,
        // The definition's parents are also loaded, because a variable of `--var` may be declared only in a parent.
        [_] => BakeOrder::load_with(&args.definitions, &args.vars.given())?.images.pop(),
        _ => return Err(Kind::Usage.error("`oven plan --os-release` takes only one definition")),
    };
    let registry = site::plugins(&global.plugin, &site::helper()?)?;
    let named = image.as_ref().and_then(target::named);
    let named = named.as_ref().map(|(id, place)| (*id, place));
    let (known, claims) = registry.detect(&os_release, named)?;
    report_containment(known, report);
    let tools = image.as_ref().map(scripts::tools).unwrap_or_default();
    let is_tool = |path: &String| tools.iter().any(|tool| programs::is_program_path(path, tool));
    let unasked = flags.has.iter().find(|path| !claims.look_for.contains(path) && !is_tool(path));
    if let Some(path) = unasked {
        report.warn(format!("--has {path}: the plugin {} does not look for this path", known.id));
    }
    let architecture = architecture(flags)?;
    let mut job = match &image {
        Some(image) => {
            for ask in &image.packages {
                if let PackageRequest::Url { url, file: None, .. } = ask {
                    report.warn(format!(
                        "the plan does not include {url}, because `oven plan --os-release` downloads nothing"
                    ));
                }
            }
            let network = Settings::for_definition(&image.dir)?.network;
            target::job::from_definition(image, os_release, architecture, &network)
        }
        None => Job { os_release, architecture: architecture.to_string(), ..Job::default() },
    };
    job.tools.retain(|tool| !flags.has.iter().any(|path| programs::is_program_path(path, tool)));
    let has = |path: &String| flags.has.is_empty() || flags.has.contains(path);
    job.present = claims.look_for.iter().map(|path| (path.clone(), has(path))).collect();
    for (path, file) in &flags.text {
        job.texts.insert(path.clone(), read("the text file", file)?);
    }
    let (key, value): (_, Value) = if flags.request {
        ("request", serde_json::to_value(PlanRequest::new(&job))?)
    } else {
        ("plan", serde_json::to_value(known.plan_for(&job, image.as_ref())?)?)
    };
    report.note(match &known.origin {
        Origin::BuiltIn => format!("planned by the built-in plugin {}", known.id),
        origin => format!("planned by the plugin {} ({origin})", known.id),
    });
    if !global.json {
        print_raw(escape_json(&format!("{value:#}")));
    }
    Ok(End::success(json!({"plugin": known.id, key: value})))
}

fn architecture(flags: &args::OsReleasePlanArgs) -> Result<Architecture> {
    let known = [Architecture::X86_64, Architecture::Arm64];
    let Some(arch) = &flags.arch else { return Ok(Architecture::HOST) };
    known.into_iter().find(|known| known.as_str() == arch).ok_or_else(|| {
        let known = known.map(Architecture::as_str).join(" or ");
        Kind::Usage.error(format!("--arch must be {known}, not {arch}"))
    })
}
