//! `oven bake`.

use super::{End, answer};
use crate::batch::{Baked, Became, bake_all};
use crate::cli::{self, Global};
use crate::error::{Kind, SUCCESS, hint_of};
use crate::order::Order;
use crate::report::{Ink, Report, printable};
use crate::settings::Strategy;
use crate::site::{Site, Use, refuse_inside};
use crate::{definition, id_file, stop};
use anyhow::Result;
use serde_json::{Value, json};
use tokio::sync::watch;

/// Of the summary's column that says why.
const REASON_MAX: usize = 200;

pub async fn run(
    global: &Global,
    args: &cli::Bake,
    report: &Report,
    stop: watch::Receiver<bool>,
) -> Result<End> {
    let found = async {
        let order = Order::with(&args.definitions, &args.vars.given())?;
        if let Some(trace) = &global.trace {
            let refused = refuse_inside("trace", trace, "Write it elsewhere: --trace FILE.", &order.images);
            // Begun already, and a file of the definition like any other.
            refused.inspect_err(|_| _ = std::fs::remove_file(trace))?;
        }
        Ok((Site::of(global, &order.images, report.clone(), Use::Builds).await?, order))
    };
    // It may take the metadata service seconds not to answer.
    let order: Result<_> = stop::or(&stop, found).await;
    let (site, order) = order.inspect_err(|_| {
        let definitions = args.definitions.iter().filter(|dir| dir.join(definition::FILE).exists());
        definitions.for_each(|dir| id_file::keep(dir, None, report));
    })?;
    if args.wish.verify && site.settings.disks() == Strategy::Attached {
        let text = "--verify compares a snapshot with what was sent, and of an attached disk nothing is sent from here";
        return Err(Kind::Usage.failure(text).hint("Bake with --disks direct.").into());
    }
    let all = bake_all(&site, global, order, &args.wish, args.jobs.into(), stop).await;
    if !global.json {
        if all.len() > 1 && !global.quiet {
            summarise(&all, report);
        }
        print_ids(&all);
    }
    Ok(End { code: exit_code(&all), result: json!({"images": all.iter().map(object).collect::<Vec<_>>()}) })
}

/// The ids of the images that were asked for: alone if it is one, with their names if they are several.
fn print_ids(all: &[Baked]) {
    let asked = all.iter().filter(|baked| baked.asked).count();
    for baked in all.iter().filter(|baked| baked.asked) {
        match baked.image() {
            Some(image) if asked == 1 => answer(&image.id),
            Some(image) => answer(format!("{}\t{}", image.id, baked.name)),
            None => {}
        }
    }
}

/// A line for each of several images.
fn summarise(all: &[Baked], report: &Report) {
    let screen = report.screen();
    let width = all.iter().map(|baked| baked.name.chars().count()).max().unwrap_or_default();
    for baked in all {
        let (word, ink, rest) = match &baked.became {
            Became::Baked(image) => ("baked", Ink::Green, image.id.0.clone()),
            Became::Found(image) => ("already baked", Ink::Green, image.id.0.clone()),
            Became::Skipped(error) => ("skipped", Ink::Yellow, first_line(error)),
            Became::Failed(error) if Kind::of(error) == Kind::Interrupted => {
                ("interrupted", Ink::Yellow, String::new())
            }
            Became::Failed(error) => ("failed", Ink::Red, first_line(error)),
        };
        let word = screen.paint(ink, &format!("{word:<13}"));
        screen.print(format!("  {:<width$}  {word}  {rest}", baked.name).trim_end());
    }
}

fn first_line(error: &anyhow::Error) -> String {
    let text = printable(&format!("{error:#}"));
    text.lines().next().unwrap_or_default().chars().take(REASON_MAX).collect()
}

/// The first failure decides; a parent that failed comes before its children. But who interrupts several knows best.
fn exit_code(all: &[Baked]) -> u8 {
    let kinds = || all.iter().filter_map(Baked::error).map(Kind::of);
    let left = all.iter().any(|baked| !baked.left.is_empty());
    match kinds().find(|kind| *kind == Kind::Interrupted).or_else(|| kinds().next()) {
        Some(kind) => kind as u8,
        None if left => Kind::LeftBehind as u8,
        None => SUCCESS,
    }
}

fn object(baked: &Baked) -> Value {
    let word = match &baked.became {
        Became::Baked(_) => "baked",
        Became::Found(_) => "already-baked",
        Became::Skipped(_) => "skipped",
        Became::Failed(_) => "failed",
    };
    // A run without a log did nothing.
    let run = baked.log.as_ref().map(|_| &baked.run);
    let mut object = json!({
        "name": baked.name, "definition": baked.dir, "run": run, "asked": baked.asked,
        "outcome": word, "log": baked.log, "kept": baked.kept,
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
    }
    object["left_behind"] =
        baked.left.iter().map(|l| json!({"what": l.what, "why": l.why, "command": l.command})).collect();
    object
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cloud::RunId;
    use crate::undo::Left;

    fn baked(failed: Option<Kind>, left: bool) -> Baked {
        let behind = Left { what: "a volume".into(), command: "oven sweep".into(), why: "busy".into() };
        let image = crate::cloud::Image {
            id: crate::cloud::ImageId("ami-1".into()),
            name: "web".into(),
            state: crate::cloud::ImageState::Available,
            architecture: crate::cloud::Architecture::HOST,
            snapshot: crate::cloud::SnapshotId("snap-1".into()),
            size_gib: 1,
            created: String::new(),
            description: String::new(),
            tags: Default::default(),
        };
        Baked {
            name: "web".into(),
            dir: "web".into(),
            asked: true,
            run: RunId::new(),
            became: failed.map_or(Became::Baked(image), |kind| Became::Failed(kind.error("no"))),
            left: Vec::from_iter(left.then_some(behind)),
            kept: Vec::new(),
            log: None,
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
