//! `oven bake`.

use super::answer;
use crate::bake::Outcome;
use crate::batch::{Baked, bake_all};
use crate::cli::{self, Global};
use crate::error::{Kind, SUCCESS};
use crate::order::Order;
use crate::report::Report;
use crate::site::Site;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;
use tokio::sync::watch;

/// Where GumGum's CI users look for the id.
const AMI_ID_FILE: &str = ".ami_id.json";

pub async fn run(
    global: &Global,
    args: &cli::Bake,
    report: &Report,
    stop: watch::Receiver<bool>,
) -> Result<u8> {
    let order = Order::of(&args.definitions)?;
    let site = Site::of(global, &order.images, report.clone())?;
    let all = bake_all(&site, global, order, &args.wish, args.jobs.into(), stop).await;
    for baked in &all {
        if let Ok(outcome) = &baked.result
            && let Err(error) = write_id(&baked.dir, &outcome.image().id.0)
        {
            report.warn(format!("{error:#}"));
        }
    }
    report.event(json!({"event": "result", "images": all.iter().map(object).collect::<Vec<_>>()}));
    if !global.json {
        print_ids(&all);
    }
    Ok(exit_code(&all))
}

/// The ids of the images that were asked for: alone if it is one, with their names if they are several.
fn print_ids(all: &[Baked]) {
    let asked = all.iter().filter(|baked| baked.asked).count();
    for baked in all.iter().filter(|baked| baked.asked) {
        match &baked.result {
            Ok(outcome) if asked == 1 => answer(&outcome.image().id),
            Ok(outcome) => answer(format!("{}\t{}", outcome.image().id, baked.name)),
            Err(_) => {}
        }
    }
}

/// The first failure decides; a parent that failed comes before its children.
fn exit_code(all: &[Baked]) -> u8 {
    let failed = all.iter().find_map(|baked| baked.result.as_ref().err());
    let left = all.iter().any(|baked| !baked.left.is_empty());
    match failed {
        Some(error) => Kind::of(error) as u8,
        None if left => Kind::LeftBehind as u8,
        None => SUCCESS,
    }
}

fn object(baked: &Baked) -> Value {
    let mut object =
        json!({"name": baked.name, "definition": baked.dir, "run": baked.run.0, "asked": baked.asked});
    match &baked.result {
        Ok(outcome) => {
            let image = outcome.image();
            let word = if matches!(outcome, Outcome::Baked(_)) { "baked" } else { "already-baked" };
            object["outcome"] = json!(word);
            object["ami_id"] = json!(image.id);
            object["ami_name"] = json!(image.name);
            object["snapshot_id"] = json!(image.snapshot);
        }
        Err(error) => {
            object["outcome"] = json!("failed");
            object["kind"] = json!(Kind::of(error).name());
            object["error"] = json!(format!("{error:#}"));
        }
    }
    object["left_behind"] =
        baked.left.iter().map(|l| json!({"what": l.what, "command": l.command})).collect();
    object["kept"] = json!(baked.kept);
    object
}

/// Written beside and renamed, so that a reader never sees half of it.
fn write_id(dir: &Path, id: &str) -> Result<()> {
    let path = dir.join(AMI_ID_FILE);
    let content = format!("{}\n", json!({"ami_id": id}));
    // Only what may be ours: a FIFO of that name would keep us waiting for ever.
    let may_be = path.symlink_metadata().is_ok_and(|m| m.is_file() && m.len() == content.len() as u64);
    if may_be && std::fs::read_to_string(&path).is_ok_and(|old| old == content) {
        return Ok(());
    }
    let write = || -> Result<()> {
        let mut file =
            tempfile::Builder::new().prefix(".ami_id.").permissions(world_readable()).tempfile_in(dir)?;
        file.write_all(content.as_bytes())?;
        file.persist(&path)?;
        Ok(())
    };
    write().with_context(|| format!("writing {}", path.display()))
}

fn world_readable() -> std::fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(0o644)
}
