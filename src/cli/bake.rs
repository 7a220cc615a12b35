//! `oven bake`.

use super::{End, answer};
use crate::bake::ami_id_file;
use crate::bake::batch::{Batch, BatchItem, Status, bake_all};
use crate::cli::args;
use crate::cli::args::GlobalArgs;
use crate::config::project::Strategy;
use crate::definition;
use crate::definition::graph::BakeOrder;
use crate::error::{Kind, SUCCESS, hint_of, unlisted_mistakes_of};
use crate::report::events::errors;
use crate::report::{Report, TextStyle};
use crate::site::{Site, Use, refuse_inside};
use crate::sys::signals;
use crate::text::without_control_characters;
use anyhow::Result;
use serde_json::{Value, json};
use tokio::sync::watch;

/// The maximal number of characters of a reason in the summary.
const REASON_MAX: usize = 200;

pub async fn run(
    global: &GlobalArgs,
    args: &args::BakeArgs,
    report: &Report,
    stop: watch::Receiver<bool>,
) -> Result<End> {
    let found = async {
        let permitted = args.secrets.permitted()?;
        let order = BakeOrder::load_or_list_wrong(&args.definitions, &args.vars.given());
        // A signal that arrived while the definitions were read ends the verb here.
        tokio::task::yield_now().await;
        let order = order.map_err(|failure| {
            // Only these definitions lose the id of their last image, because no bake of the others began.
            let wrong = failure.wrong.iter().filter(|dir| dir.join(definition::FILE).exists());
            wrong.for_each(|dir| ami_id_file::update(dir, None, report));
            failure.error
        })?;
        permitted.ensure_permitted(&order.images).inspect_err(|_| {
            // The result is the same as with a secret that is not set.
            let refused = permitted.refused(&order.images);
            refused.for_each(|image| ami_id_file::update(&image.dir, None, report));
        })?;
        if let Some(trace) = &global.trace {
            let refused = refuse_inside(
                "trace",
                trace,
                "Write the trace to another directory: --trace FILE.",
                &order.images,
            );
            // The trace file was created already. It is removed, because it would count as a file of the definition.
            refused.inspect_err(|_| _ = std::fs::remove_file(trace))?;
        }
        Ok((Site::of(&global.overrides(), &order.images, report.clone(), Use::Builds).await?, order))
    };
    // A signal must be able to stop this work, because the work takes seconds if there is no metadata service.
    let order: Result<_> = signals::run_until_stopped(&stop, found).await;
    let (site, order) = order?;
    if args.options.verify && site.settings.disks() == Strategy::Attached {
        let text = "--verify works only with --disks direct, because with attached disks oven sends no blocks that it \
                    could compare";
        return Err(Kind::Usage.error(text));
    }
    let batch = Batch {
        site,
        overrides: global.overrides(),
        order,
        options: (&args.options).into(),
        jobs: args.jobs.into(),
    };
    let all = bake_all(batch, stop).await;
    if !global.json {
        if all.len() > 1 && !global.quiet {
            summarise(&all, report);
        }
        print_ids(&all);
    }
    Ok(End { code: exit_code(&all), result: json!({"images": all.iter().map(object).collect::<Vec<_>>()}) })
}

/// Prints the ids of the requested images, with their names if there are several.
fn print_ids(all: &[BatchItem]) {
    let asked = all.iter().filter(|baked| baked.asked).count();
    for baked in all.iter().filter(|baked| baked.asked) {
        match baked.image() {
            Some(image) if asked == 1 => answer(&image.id),
            Some(image) => answer(format!("{}\t{}", image.id, baked.name)),
            None => {}
        }
    }
}

/// Prints a line for each of several images.
fn summarise(all: &[BatchItem], report: &Report) {
    let screen = report.screen();
    let width = all.iter().map(|baked| baked.name.chars().count()).max().unwrap_or_default();
    for baked in all {
        let (word, ink, rest) = match &baked.status {
            Status::Baked(image) => {
                ("baked", TextStyle::Green, format!("{}  {}", image.id, baked.summary.line(image.size_gib)))
            }
            Status::Found(image) => ("already baked", TextStyle::Green, image.id.0.clone()),
            Status::Skipped(error) => ("skipped", TextStyle::Yellow, first_line(error)),
            Status::Failed(error) if Kind::of(error) == Kind::Interrupted => {
                ("interrupted", TextStyle::Yellow, String::new())
            }
            Status::Failed(error) => ("failed", TextStyle::Red, first_line(error)),
        };
        let word = screen.paint(ink, &format!("{word:<13}"));
        screen.print(format!("  {:<width$}  {word}  {rest}", baked.name).trim_end());
    }
}

fn first_line(error: &anyhow::Error) -> String {
    let text = format!("{error:#}");
    without_control_characters(&text).lines().next().unwrap_or_default().chars().take(REASON_MAX).collect()
}

/// The exit code of the first failure. A failed parent comes before its children. An interruption takes precedence over
/// other failures.
fn exit_code(all: &[BatchItem]) -> u8 {
    let kinds = || all.iter().filter_map(BatchItem::error).map(Kind::of);
    let left = all.iter().any(|baked| !baked.leftovers.is_empty());
    match kinds().find(|kind| *kind == Kind::Interrupted).or_else(|| kinds().next()) {
        Some(kind) => kind as u8,
        None if left => Kind::LeftBehind as u8,
        None => SUCCESS,
    }
}

fn object(baked: &BatchItem) -> Value {
    let word = match &baked.status {
        Status::Baked(_) => "baked",
        Status::Found(_) => "already-baked",
        Status::Skipped(_) => "skipped",
        Status::Failed(_) => "failed",
    };
    // Paths that are not UTF-8 cannot be in JSON as they are.
    let log = baked.log.as_ref().map(|log| log.to_string_lossy());
    // A run without a log file did nothing, so its id is left out.
    let run = baked.log.as_ref().map(|_| &baked.run);
    let mut object = json!({
        "name": baked.name, "definition": baked.dir.to_string_lossy(), "run": run, "asked": baked.asked,
        "outcome": word, "log": log, "kept": baked.preserved,
    });
    if let Some(image) = baked.image() {
        object["ami_id"] = json!(image.id);
        object["ami_name"] = json!(image.name);
        object["snapshot_id"] = json!(image.snapshot);
    }
    if let Some(error) = baked.error() {
        object["kind"] = json!(Kind::of(error).name());
        object["error"] = json!(format!("{error:#}"));
        object["hint"] = json!(hint_of(error));
        object["errors"] = json!(errors(error));
        let unlisted = unlisted_mistakes_of(error);
        if unlisted > 0 {
            object["more_errors"] = json!(unlisted);
        }
    }
    object["left_behind"] =
        baked.leftovers.iter().map(|l| json!({"what": l.what, "why": l.why, "command": l.command})).collect();
    object
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::RunId;
    use crate::report::BakeSummary;
    use crate::undo::Leftover;

    fn baked(failed: Option<Kind>, left: bool) -> BatchItem {
        let behind = Leftover { what: "a volume".into(), command: "oven sweep".into(), why: "busy".into() };
        let image = crate::cloud::Image {
            id: crate::ids::ImageId("ami-1".into()),
            name: "web".into(),
            state: crate::cloud::ImageState::Available,
            architecture: crate::ids::Architecture::HOST,
            snapshot: crate::ids::SnapshotId("snap-1".into()),
            size_gib: 1,
            created: String::new(),
            description: String::new(),
            tags: Default::default(),
        };
        BatchItem {
            name: "web".into(),
            dir: "web".into(),
            asked: true,
            run: RunId::new(),
            begun: true,
            status: failed.map_or(Status::Baked(image), |kind| Status::Failed(kind.error("no"))),
            leftovers: Vec::from_iter(left.then_some(behind)),
            preserved: Vec::new(),
            log: None,
            summary: BakeSummary::default(),
        }
    }

    #[test]
    fn exit_codes() {
        let (good, messy) = (|| baked(None, false), || baked(None, true));
        assert_eq!(exit_code(&[good(), good()]), SUCCESS);
        assert_eq!(exit_code(&[good(), messy()]), Kind::LeftBehind as u8);
        let failed = |kind| baked(Some(kind), true);
        assert_eq!(exit_code(&[messy(), failed(Kind::Step), failed(Kind::NotFound)]), Kind::Step as u8);
    }
}
