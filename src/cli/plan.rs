//! `oven plan`.

use super::{End, answer};
use crate::bake::options::{BakeOptions, Compat};
use crate::bake::planned_steps::{self, PlannedStep};
use crate::bake::secrets::PermittedSecrets;
use crate::bake::target::Target;
use crate::bake::{Bake, preflight, target};
use crate::cli::args;
use crate::cli::args::GlobalArgs;
use crate::cloud::{BaseRef, Image, tag};
use crate::config::overrides::Overrides;
use crate::config::project::Strategy;
use crate::definition::graph::BakeOrder;
use crate::definition::{BaseSource, Definition};
use crate::identity::fingerprint;
use crate::identity::fingerprint::{Inputs, PreviousInputs};
use crate::ids::{ImageId, RunId};
use crate::report::Report;
use crate::site::{Site, Use};
use crate::text::escape_name;
use anyhow::Result;
use serde::Deserialize;
use serde_json::json;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::sync::watch;

/// What a bake would do with a definition.
#[derive(Default)]
struct Verdict {
    /// The image, if it exists already.
    hit: Option<Image>,
    /// If there is no image yet, the reasons why a new one would be baked.
    why: Vec<String>,
    /// The times of the bake of the newest image.
    last: Option<LastBake>,
    /// What a new image would be made from; `None` if the parent has to be baked first.
    target: Option<Target>,
    /// With `--steps`: the steps that a bake would run.
    steps: Option<Vec<PlannedStep>>,
}

/// The times of a bake, as [`target::TIMES`] has them.
#[derive(Deserialize)]
struct LastBake {
    total_ms: u64,
    phases_ms: BTreeMap<String, u64>,
}

impl LastBake {
    /// The times, with the longest phases. Names that oven does not use for phases are left out, because somebody else
    /// may have written the document.
    fn describe(&self) -> String {
        let seconds = |ms: u64| Duration::from_millis(ms).as_secs_f64();
        let is_name = |name: &str| {
            (1..=MAX_PHASE).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_lowercase())
        };
        let phases = self.phases_ms.iter().filter(|(phase, _)| is_name(phase));
        let mut phases: Vec<_> = phases.map(|(phase, ms)| (*ms, phase)).collect();
        phases.sort_unstable_by(|one, other| other.cmp(one));
        let longest = phases.iter().take(MAX_PHASES);
        let longest: Vec<_> = longest.map(|(ms, phase)| format!("{phase} {:.1} s", seconds(*ms))).collect();
        let longest = if longest.is_empty() { String::new() } else { format!(" ({})", longest.join(", ")) };
        format!("the last bake took {:.1} s{longest}", seconds(self.total_ms))
    }
}

/// The number of phases that are shown, the longest first.
const MAX_PHASES: usize = 3;
/// The maximal length of a phase's name.
const MAX_PHASE: usize = 16;

/// The settings of the command line. The steps are found with direct disks, so that a plan creates no volume.
pub fn overrides(global: &GlobalArgs, args: &args::PlanArgs) -> Overrides {
    let overrides = global.overrides();
    let direct = || Some(Strategy::Direct.as_str().to_owned());
    let disks = if args.steps { direct() } else { overrides.disks };
    Overrides { disks, ..overrides }
}

/// `stop` becomes true if a signal asks this process to end. It is set with `--steps`.
pub async fn run(
    global: &GlobalArgs,
    args: &args::PlanArgs,
    report: &Report,
    stop: Option<watch::Receiver<bool>>,
) -> Result<End> {
    let permitted = args.secrets.permitted()?;
    let order = BakeOrder::load_with(&args.definitions, &args.vars.given())?;
    let (overrides, used) = (overrides(global, args), if args.steps { Use::Builds } else { Use::Looks });
    let site = Site::of(&overrides, &order.images, report.clone(), used).await?;
    let options = BakeOptions { compat: args.compat.map(Into::into), ..BakeOptions::default() };
    let mut objects = Vec::new();
    let mut hits: Vec<Option<ImageId>> = Vec::new();
    for (i, image) in order.images.iter().enumerate() {
        let site = site.for_image(&overrides, image, report.clone())?;
        let from = match (&image.from, order.parent[i].map(|p| &hits[p])) {
            (BaseSource::Image(from), _) => Some(from.clone()),
            (BaseSource::Parent(_), parent) => parent.cloned().flatten().map(BaseRef::Id),
        };
        let mut verdict = match (&image.from, &from) {
            (_, Some(from)) => judge(&site, image, from, options.compat).await?,
            (BaseSource::Parent(dir), None) => {
                target::check_links(&site.report, image, &fingerprint::read_links(image)?)?;
                let why = vec![format!("its parent {} will be baked first", escape_name(dir))];
                Verdict { why, last: last_bake(&newest(&site, image).await?), ..Verdict::default() }
            }
            (BaseSource::Image(_), None) => unreachable!("an image of the cloud is a base"),
        };
        if let (Some(stop), Some(from), Some(target)) = (&stop, &from, &verdict.target) {
            let bake = Bake { site: &site, image, from, options: &options, run: &RunId::new() };
            match steps(&bake, target, stop.clone()).await {
                Ok(steps) => verdict.steps = Some(steps),
                // The error was already reported.
                Err(error) => return Ok(End::failure(&error)),
            }
        }
        objects.push(json!({
            "name": image.name, "definition": image.dir.to_string_lossy(),
            "vars": image.vars.values(), "secrets": secrets(image),
            "permitted_secrets": secrets(image).into_keys().filter(|name| permitted.permits(name)).collect::<Vec<_>>(),
            "hit": verdict.hit.is_some(), "ami_id": verdict.hit.as_ref().map(|h| &h.id), "why": verdict.why,
            "last_ms": verdict.last.as_ref().map(|last| last.total_ms),
        }));
        if let (true, Some(object)) = (args.steps, objects.last_mut()) {
            object["steps"] = json!(verdict.steps);
        }
        if !global.json {
            print(image, &verdict, &permitted);
            if args.steps {
                print_steps(&verdict);
            }
        }
        hits.push(verdict.hit.map(|hit| hit.id));
    }
    Ok(End::success(json!({"images": objects})))
}

/// Lists the steps of a bake. Reports an error.
async fn steps(
    bake: &Bake<'_>,
    target: &Target,
    mut stop: watch::Receiver<bool>,
) -> Result<Vec<PlannedStep>> {
    let stop = async move { _ = stop.wait_for(|stop| *stop).await };
    let ended = planned_steps::list(bake, target, stop).await;
    super::warn_of_leftovers(bake.site, &ended.leftovers);
    ended.result
}

fn print_steps(verdict: &Verdict) {
    let Some(steps) = &verdict.steps else {
        if verdict.hit.is_none() {
            answer("  its steps are known when its parent is baked");
        }
        return;
    };
    answer("  steps:");
    let width = steps.iter().map(|step| step.phase.len()).max().unwrap_or_default();
    for PlannedStep { phase, what, skipped_if } in steps {
        let skipped = skipped_if.map(|when| format!(" (skipped if {when})")).unwrap_or_default();
        answer(format!("    {phase:<width$}  {what}{skipped}"));
    }
}

fn print(image: &Definition, verdict: &Verdict, permitted: &PermittedSecrets) {
    match &verdict.hit {
        Some(hit) => answer(format!("{}: already baked as {}", image.name, hit.id)),
        None => answer(format!("{}: to be baked", image.name)),
    }
    for why in &verdict.why {
        answer(format!("  {why}"));
    }
    if let Some(last) = &verdict.last {
        answer(format!("  {}", last.describe()));
    }
    for (name, value) in image.vars.values() {
        let source = if image.vars.given.contains_key(&name) { "--var" } else { "[vars]" };
        answer(format!("  with {name} = {value:?} ({source})"));
    }
    for (name, there) in secrets(image) {
        let there = match there {
            _ if !permitted.permits(&name) => format!("not permitted: a bake needs --secret {name}"),
            true => "in the environment".to_owned(),
            false => "not in the environment, but a bake needs it".to_owned(),
        };
        answer(format!("  with the secret {name} ({there})"));
    }
}

/// The names of the secrets that a bake needs, and whether they are set.
fn secrets(image: &Definition) -> BTreeMap<String, bool> {
    let names = image.runs.iter().chain(&image.tests).flat_map(|script| &script.secrets);
    names.map(|name| (name.clone(), std::env::var_os(name).is_some())).collect()
}

async fn judge(site: &Site, image: &Definition, from: &BaseRef, compat: Option<Compat>) -> Result<Verdict> {
    let base = target::base(site, image, from).await?;
    let attributes = target::attributes(image, &base)?;
    let inputs = target::inputs(site, image, &base)?;
    if let Some(hit) = site.cloud.find(&target::key(&inputs, compat)).await? {
        return Ok(Verdict { hit: Some(hit), ..Verdict::default() });
    }
    let newest = newest(site, image).await?;
    let (last, why) = (last_bake(&newest), reasons(site, image, &inputs, newest).await?);
    Ok(Verdict { why, last, target: Some(Target { base, attributes, inputs }), ..Verdict::default() })
}

/// The newest image of a definition, and its documents.
type Newest = Option<(Image, BTreeMap<String, String>)>;

async fn newest(site: &Site, image: &Definition) -> Result<Newest> {
    match site.cloud.images(Some(&image.name)).await?.pop() {
        Some(newest) => Ok(Some(site.cloud.image(&newest.id).await?)),
        None => Ok(None),
    }
}

/// The times of the bake that made an image, if this machine knows them.
fn last_bake(newest: &Newest) -> Option<LastBake> {
    let (_, documents) = newest.as_ref()?;
    serde_json::from_str(documents.get(target::TIMES)?).ok()
}

/// The reasons why a new image would be baked.
async fn reasons(site: &Site, image: &Definition, inputs: &Inputs, newest: Newest) -> Result<Vec<String>> {
    let name = target::name(image, inputs, None);
    if let Some(holder) = preflight::name_holder(site, &name).await? {
        let why = format!(
            "{} is a failed or incomplete image with the name {name}: bake with --replace-failed",
            holder.id
        );
        return Ok(vec![why]);
    }
    let Some((newest, documents)) = newest else {
        return Ok(vec![format!("no image of the definition `{}` exists yet", image.name)]);
    };
    let mut why = vec![format!("compared with {}, the newest image of this definition:", newest.id)];
    let tag = newest.tags.get(tag::INPUTS).map(String::as_str);
    let document = |name: &str| documents.get(name).map(String::as_str);
    let old = PreviousInputs::of(document(target::INPUTS), tag);
    match old.map(|old| old.with_keys(document(target::KEYS))) {
        Some(old) => {
            let mut lines = fingerprint::explain(&old, inputs);
            if lines.is_empty() {
                lines.push(format!("nothing differs, but that image is {:?}", newest.state).to_lowercase());
            }
            why.extend(lines.into_iter().map(|line| format!("  {line}")));
        }
        None => why.push("  its inputs are unknown, because oven did not bake it".into()),
    }
    if image.name_is_default {
        why.push("image.toml has no `name`, so oven uses the directory's name. Set `name`, because the directory may \
                  have another name in another checkout".into());
    }
    Ok(why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_times_of_the_last_bake_show_only_names_of_phases() {
        let long = "x".repeat(1 << 20);
        let forged =
            json!({"a\nerror: forged": 9, "install": 1200, &long: 9, "": 9, "\u{1b}[2J": 9, "ünicode": 9});
        for (phases, expected) in [
            (json!({}), "the last bake took 61.5 s"),
            (json!({"a b": 1, "UPPER": 2}), "the last bake took 61.5 s"),
            (forged, "the last bake took 61.5 s (install 1.2 s)"),
            (
                json!({"fetch": 10_000, "install": 30_000, "clean": 100, "checkout": 2_040}),
                "the last bake took 61.5 s (install 30.0 s, fetch 10.0 s, checkout 2.0 s)",
            ),
        ] {
            let last: LastBake =
                serde_json::from_value(json!({"total_ms": 61_500, "phases_ms": phases})).unwrap();
            assert_eq!(last.describe(), expected);
        }
    }
}
