//! Step 6: registers the snapshot as an image.

use super::target::{self, Target};
use super::{Bake, Outcome};
use crate::cloud::{Image, ImageSpec};
use crate::ids::SnapshotId;
use crate::site::Site;
use crate::undo::Undo;
use anyhow::{Context, Result};
use std::collections::BTreeMap;

pub const PHASE: &str = "register";

/// The title of the step for an image's name.
pub fn title(name: &str) -> String {
    format!("registering {name}")
}

/// Registers the image of a bake. If another builder registered it first, returns that builder's image.
pub async fn image(
    bake: &Bake<'_>,
    target: Target,
    facts: BTreeMap<String, String>,
    snapshot: &SnapshotId,
    undo: &Undo,
) -> Result<Outcome> {
    let spec = target::image_spec(bake, target, facts);
    Ok(Outcome::of(snapshot_as(bake.site, snapshot, &spec, undo).await?, bake.run))
}

/// Registers a snapshot, and shows a progress line.
pub async fn snapshot_as(site: &Site, snapshot: &SnapshotId, spec: &ImageSpec, undo: &Undo) -> Result<Image> {
    let step = site.report.step(PHASE, title(&spec.name));
    let registered = site.cloud.register(snapshot, spec, undo).await;
    let image = registered.with_context(|| format!("registering {snapshot}"))?;
    step.done();
    Ok(image)
}
