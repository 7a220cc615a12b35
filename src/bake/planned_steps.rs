//! Lists the steps that a bake would run, without running them.

use super::Bake;
use super::provision::Provisioning;
use super::target::{self, Target};
use super::{checkout, commit, download, mount, provision, register};
use crate::cloud::block_api::ParentUse;
use crate::disk::DiskSpec;
use crate::error::Kind;
use crate::mount::{MountOptions, Root};
use crate::provision::{definition_files, plan_files, plan_steps, scripts};
use crate::seal;
use crate::undo::{self, Ended};
use anyhow::{Context, Result};
use oven_distro::Step;
use serde::Serialize;
use std::future::Future;

/// A step of a bake.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PlannedStep {
    pub phase: String,
    pub what: String,
    /// The condition under which the bake skips the step; `None` if it always runs.
    pub skipped_if: Option<&'static str>,
}

/// When a step is skipped that needs to run only once on a machine.
const DONE: &str = "an earlier bake on this machine did it, and nothing has changed since";
/// When Ansible is not installed for the bake only.
const HAS_ANSIBLE: &str = "the packages or an earlier script install Ansible";

/// Lists the steps of a bake. Reads the base's disk, and downloads the packages that the definition names by URL. The
/// site must use direct disks, so that no volume is created.
///
/// Not listed are the steps of the package cache, and steps that depend on what earlier steps change: the check of a new
/// kernel, and the labels of SELinux.
pub async fn list(
    bake: &Bake<'_>,
    target: &Target,
    stop: impl Future<Output = ()>,
) -> Ended<Vec<PlannedStep>> {
    undo::scope(bake.site.undo_policy(false), stop, async |undo| {
        let site = bake.site;
        ensure_readable(bake, target).await?;
        let packages = download::download_packages(bake).await?;
        let disk = site.disks.checkout(&target.base, &DiskSpec::default(), bake.run, &undo).await?;
        let options = MountOptions::default();
        let root = Root::mount(disk.device(), &site.scratch(bake.run)?, &options, &site.report).await?;
        let work = provision::plan(bake, target, packages, &root)?;
        root.close().await?;
        Ok(steps(bake, target, &work))
    })
    .await
}

/// Fails if the base's disk can only be read from a copy of its snapshot. A plan makes no copy, because it costs money.
async fn ensure_readable(bake: &Bake<'_>, target: &Target) -> Result<()> {
    let (base, kind) = (&target.base, &DiskSpec::default().kind);
    let parent =
        bake.site.blocks.parent(&base.snapshot, kind).await.context("looking for the base's snapshot")?;
    let ParentUse::CopyFirst { why } = parent else { return Ok(()) };
    let message = format!("{} has to be copied before its files can be read, because {why}", base.snapshot);
    let hint = "A plan copies nothing. Plan without --steps, or bake: the bake makes the copy.";
    Err(Kind::Cloud.failure(message).hint(hint).into())
}

fn steps(bake: &Bake<'_>, target: &Target, work: &Provisioning) -> Vec<PlannedStep> {
    let (plan, image) = (&work.plan, &work.image);
    let step = |phase: &str, what: String| PlannedStep { phase: phase.to_owned(), what, skipped_if: None };
    let of_plan = |step: &Step| PlannedStep {
        phase: plan_steps::phase(step.phase).to_owned(),
        what: step.why.clone(),
        skipped_if: step.once.then_some(DONE),
    };
    let mut steps = vec![step(checkout::PHASE, checkout::title(&target.base))];
    if !plan.files.is_empty() {
        steps.push(step(definition_files::FILES_PHASE, plan_files::title(plan.files.len())));
    }
    steps.extend(plan_steps::provisioning(plan).map(of_plan));
    let placed = |after_run: bool| {
        let files = image.files.iter().filter(|file| file.after_run == after_run).count();
        (files > 0).then(|| step(definition_files::FILES_PHASE, definition_files::title(files, after_run)))
    };
    steps.extend(placed(false));
    let for_bake_only = |step: &Step| PlannedStep { skipped_if: Some(HAS_ANSIBLE), ..of_plan(step) };
    let (first, last) = {
        let is_playbook = |script: &crate::definition::Script| script.playbook().is_some();
        (image.runs.iter().position(is_playbook), image.runs.iter().rposition(is_playbook))
    };
    for (index, script) in image.runs.iter().enumerate() {
        let tools = plan.tools.as_ref();
        if let Some(tools) = tools.filter(|_| first == Some(index)) {
            steps.extend(tools.steps.iter().map(for_bake_only));
        }
        steps.push(step(script.kind.key(), scripts::title(script)));
        if let Some(tools) = tools.filter(|_| last == Some(index)) {
            steps.extend(tools.remove.iter().map(for_bake_only));
        }
    }
    steps.extend(placed(true));
    steps.extend(image.tests.iter().map(|test| step(test.kind.key(), scripts::title(test))));
    steps.extend(plan_steps::cleaning(plan).map(of_plan));
    let name = target::name(image, &target.inputs, bake.options.force.then_some(bake.run));
    let end =
        [seal::CLEAN, mount::RELEASE, commit::SNAPSHOT].map(|(phase, what)| step(phase, what.to_owned()));
    steps.extend(end);
    steps.push(step(register::PHASE, register::title(&name)));
    steps
}
