//! Bakes several definitions. A parent is baked before its children. Independent definitions are baked concurrently.

use super::options::BakeOptions;
use super::{Bake, Outcome};
use crate::bake::ami_id_file;
use crate::cloud::{BaseRef, Image};
use crate::config::overrides::Overrides;
use crate::definition::graph::BakeOrder;
use crate::definition::{BaseSource, Definition};
use crate::disk::step_record;
use crate::error::Kind;
use crate::ids::{ImageId, RunId};
use crate::report::{BakeSummary, Report};
use crate::site::Site;
use crate::undo::Leftover;
use anyhow::{Error, Result};
use std::path::PathBuf;
use std::rc::Rc;
use tokio::sync::{Semaphore, watch};

/// The result of one definition.
#[derive(Debug)]
pub struct BatchItem {
    pub name: String,
    pub dir: PathBuf,
    /// Whether the user named the definition. The other definitions are in the batch because they are parents of named
    /// definitions.
    pub asked: bool,
    pub run: RunId,
    /// Whether the definition's own bake began. It may still have found an existing image.
    pub begun: bool,
    pub status: Status,
    pub leftovers: Vec<Leftover>,
    pub preserved: Vec<String>,
    /// The log file, if the bake wrote one.
    pub log: Option<PathBuf>,
    /// What changed, and where the time went.
    pub summary: BakeSummary,
}

#[derive(Debug)]
pub enum Status {
    Baked(Image),
    /// The image existed already, or another builder registered it first.
    Found(Image),
    /// The definition was not baked, because its parent has no image.
    Skipped(Error),
    Failed(Error),
}

impl BatchItem {
    fn new(image: &Definition, asked: bool) -> Self {
        let status = Status::Skipped(Kind::NotFound.error("it was not baked"));
        let (name, dir, run) = (image.name.clone(), image.dir.clone(), RunId::new());
        Self {
            name,
            dir,
            asked,
            run,
            begun: false,
            status,
            leftovers: Vec::new(),
            preserved: Vec::new(),
            log: None,
            summary: BakeSummary::default(),
        }
    }

    pub fn image(&self) -> Option<&Image> {
        match &self.status {
            Status::Baked(image) | Status::Found(image) => Some(image),
            Status::Skipped(_) | Status::Failed(_) => None,
        }
    }

    pub fn error(&self) -> Option<&Error> {
        match &self.status {
            Status::Skipped(error) | Status::Failed(error) => Some(error),
            Status::Baked(_) | Status::Found(_) => None,
        }
    }
}

/// Children wait for this value. It is `None` until the parent's bake has ended. Then it becomes `Some` with the id of
/// the parent's image, or `Some(None)` if the parent has no image.
type Parent = watch::Receiver<Option<Option<ImageId>>>;

/// Definitions to bake, and the options for baking them.
pub struct Batch {
    pub site: Site,
    /// Flags and environment variables. They override the settings in the oven.toml of each definition.
    pub overrides: Overrides,
    pub order: BakeOrder,
    /// `force` applies only to the definitions that the user named, not to their parents.
    pub options: BakeOptions,
    /// The maximum number of concurrent bakes.
    pub jobs: usize,
}

/// Bakes all definitions of a batch.
pub async fn bake_all(batch: Batch, stop: watch::Receiver<bool>) -> Vec<BatchItem> {
    let slots = Rc::new(Semaphore::new(batch.jobs));
    let batch = Rc::new(batch);
    let order = &batch.order;
    let widest = order.images.iter().map(|image| image.name.chars().count()).max();
    let column = widest.filter(|_| order.images.len() > 1);
    let tasks = tokio::task::LocalSet::new();
    let mut parents: Vec<Parent> = Vec::new();
    let mut handles = Vec::new();
    for (i, image) in order.images.iter().enumerate() {
        let (sender, receiver) = watch::channel(None);
        parents.push(receiver);
        let parent = order.parent[i].map(|p| (order.images[p].name.clone(), parents[p].clone()));
        let (batch, slots, stop) = (batch.clone(), slots.clone(), stop.clone());
        let report = batch.site.report.for_image(&image.name, column);
        handles.push(tasks.spawn_local(report.track().follow(async move {
            let image = &batch.order.images[i];
            let mut item = BatchItem::new(image, batch.order.named[i]);
            match parent_image(image, parent).await {
                Ok(from) => {
                    let member = Member { batch: &batch, image, report: &report, slots: &slots };
                    bake_member(&member, &mut item, &from, stop).await;
                }
                Err(error) if *stop.borrow() => {
                    item.status = Status::Failed(interrupted(error));
                }
                Err(error) => item.status = Status::Skipped(error),
            }
            item.log = report.log_path();
            item.summary = report.summary();
            // A definition that was skipped or interrupted before its bake began keeps the file of its last image.
            if item.begun {
                ami_id_file::update(&item.dir, item.image().map(|image| &image.id), &report);
            }
            report_result(&item, &report, column.is_some());
            _ = sender.send(Some(item.image().map(|image| image.id.clone())));
            item
        })));
    }
    tasks.await;
    let mut all = Vec::new();
    for handle in handles {
        all.push(handle.await.expect("a bake does not panic"));
    }
    all
}

/// Returns the base image of a definition. If the definition has a parent, waits for the parent's image.
async fn parent_image(image: &Definition, parent: Option<(String, Parent)>) -> Result<BaseRef> {
    let (name, mut parent) = match (&image.from, parent) {
        (BaseSource::Image(from), _) => return Ok(from.clone()),
        (BaseSource::Parent(_), Some(parent)) => parent,
        (BaseSource::Parent(dir), None) => {
            let what = format!("{} is not among the definitions to bake", dir.display());
            return Err(Kind::Definition.error(what));
        }
    };
    match parent.wait_for(Option::is_some).await.as_deref() {
        Ok(Some(Some(id))) => Ok(BaseRef::Id(id.clone())),
        _ => Err(Kind::NotFound.error(format!("its parent {name} has no image"))),
    }
}

fn interrupted(error: Error) -> Error {
    Kind::Interrupted.error(format!("interrupted: {error}"))
}

/// A definition of a batch, and the values that its bake needs.
struct Member<'a> {
    batch: &'a Batch,
    image: &'a Definition,
    report: &'a Report,
    /// Each bake takes one slot while it runs.
    slots: &'a Semaphore,
}

/// Bakes one definition of a batch when a slot is free. Each bake has a separate log.
async fn bake_member(
    member: &Member<'_>,
    item: &mut BatchItem,
    from: &BaseRef,
    mut stop: watch::Receiver<bool>,
) {
    let Member { batch, image, report, slots } = *member;
    let site = match batch.site.for_image(&batch.overrides, image, report.clone()) {
        Ok(site) => site,
        Err(error) => {
            report.failure(&error);
            item.status = Status::Failed(error);
            return;
        }
    };
    let options = BakeOptions { force: batch.options.force && item.asked, ..batch.options.clone() };
    let (run, dir) = (&item.run, std::path::absolute(&image.dir).unwrap_or_else(|_| image.dir.clone()));
    let _slot = slots.acquire().await.expect("the semaphore is never closed");
    report.log_to(&site.log(run), &format!("run {run} bakes {}", dir.display()));
    item.begun = !*stop.borrow();
    let stop = async move { _ = stop.wait_for(|stop| *stop).await };
    let whole = report.begin_work(&format!("baking {}", image.name));
    let bake = Bake { site: &site, image, from, options: &options, run };
    let mut ended = super::bake(&bake, stop).await;
    whole.ended(match &ended.result {
        Ok(Outcome::Baked(_)) => "baked",
        Ok(Outcome::AlreadyBaked(_)) => "already baked",
        Err(error) => Kind::of(error).name(),
    });
    for left in &mut ended.leftovers {
        left.command = site.command_for_site(&left.command);
        report.warn(left.to_string());
    }
    if ended.preserved.is_empty() {
        // A record without its disk is useless.
        step_record::remove(&site.state, run).unwrap_or_else(|error| report.warn(format!("{error:#}")));
    }
    for kept in &ended.preserved {
        let command = |verb: &str| site.command_for_site(&format!("oven {verb} {}", run.short()));
        let mut text = format!("preserved {kept}\n    inspect it: {}", command("shell"));
        if step_record::exists(&site.state, run) {
            text += &format!("\n    run the failed step again: {}", command("shell --rerun"));
        }
        report.note(format!("{text}\n    remove it:  {}", command("sweep --kept --run")));
    }
    (item.leftovers, item.preserved) = (ended.leftovers, ended.preserved);
    item.status = match ended.result {
        Ok(Outcome::Baked(image)) => Status::Baked(image),
        Ok(Outcome::AlreadyBaked(image)) => Status::Found(image),
        Err(error) => Status::Failed(error),
    };
}

/// The message if a bake was interrupted and everything was removed.
pub const INTERRUPTED_CLEANLY: &str = "interrupted; nothing was left behind";

/// Reports the end of a bake. If there are several bakes, fewer messages are shown, because the summary at the end
/// lists all ids. Failures are not reported here, because they were reported before the clean-up.
fn report_result(item: &BatchItem, report: &Report, several: bool) {
    match &item.status {
        Status::Baked(image) => {
            report.note(format!("baked: {} ({})", image.id, image.name));
            let size = image.size_gib;
            match several {
                true => report.detail(item.summary.line(size)),
                false => item.summary.lines(size).iter().for_each(|line| report.close(line)),
            }
            report.times();
        }
        Status::Found(image) => {
            let text = format!("already baked: {} ({})", image.id, image.name);
            if several { report.detail(text) } else { report.note(text) }
        }
        Status::Skipped(error) => report.warn(format!("skipped: {error}")),
        Status::Failed(error)
            if Kind::of(error) == Kind::Interrupted && item.leftovers.is_empty() && !several =>
        {
            report.note(INTERRUPTED_CLEANLY);
        }
        Status::Failed(_) => {}
    }
}
