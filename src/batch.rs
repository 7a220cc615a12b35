//! Several bakes: parents before children, independent ones concurrently.

use crate::bake::{Outcome, bake};
use crate::cli::{Global, Wish};
use crate::cloud::{BaseRef, Image, ImageId, RunId};
use crate::definition::{Definition, From};
use crate::error::Kind;
use crate::order::Order;
use crate::site::Site;
use crate::undo::{Ended, Left};
use crate::{id_file, report::Report};
use anyhow::{Error, Result, bail};
use std::path::PathBuf;
use std::rc::Rc;
use tokio::sync::{Semaphore, watch};

/// The result of one definition.
#[derive(Debug)]
pub struct Baked {
    pub name: String,
    pub dir: PathBuf,
    /// Whether the user named it; other definitions are only parents of these.
    pub asked: bool,
    pub run: RunId,
    pub became: Became,
    pub left: Vec<Left>,
    pub kept: Vec<String>,
    /// The log file, if there was any work.
    pub log: Option<PathBuf>,
}

#[derive(Debug)]
pub enum Became {
    Baked(Image),
    /// The image existed already, or another builder was faster.
    Found(Image),
    /// Not baked, as its parent has no image.
    Skipped(Error),
    Failed(Error),
}

impl Baked {
    pub fn image(&self) -> Option<&Image> {
        match &self.became {
            Became::Baked(image) | Became::Found(image) => Some(image),
            Became::Skipped(_) | Became::Failed(_) => None,
        }
    }

    pub fn error(&self) -> Option<&Error> {
        match &self.became {
            Became::Skipped(error) | Became::Failed(error) => Some(error),
            Became::Baked(_) | Became::Found(_) => None,
        }
    }
}

/// What children wait for: `None` until the parent's bake has ended, then its image's id, if it has an image.
type Parent = watch::Receiver<Option<Option<ImageId>>>;

/// Bakes all definitions of an order, at most `jobs` at a time. `--force` only applies to the definitions that the
/// user named.
pub async fn bake_all(
    site: &Site,
    global: &Global,
    order: Order,
    wish: &Wish,
    jobs: usize,
    stop: watch::Receiver<bool>,
) -> Vec<Baked> {
    let (order, permits) = (Rc::new(order), Rc::new(Semaphore::new(jobs)));
    let widest = order.images.iter().map(|image| image.name.chars().count()).max();
    let column = widest.filter(|_| order.images.len() > 1);
    let tasks = tokio::task::LocalSet::new();
    let mut parents: Vec<Parent> = Vec::new();
    let mut handles = Vec::new();
    for (i, image) in order.images.iter().enumerate() {
        let (sender, receiver) = watch::channel(None);
        parents.push(receiver);
        let parent = order.parent[i].map(|p| (order.images[p].name.clone(), parents[p].clone()));
        let asked = order.named[i];
        let wish = Wish { force: wish.force && asked, ..wish.clone() };
        let (site, order, permits, stop, global) =
            (site.clone(), order.clone(), permits.clone(), stop.clone(), global.clone());
        let report = site.report.of(&image.name, column);
        handles.push(tasks.spawn_local(report.track().follow(async move {
            let (image, run) = (&order.images[i], RunId::new());
            let (became, left, kept) = match parent_image(image, parent).await {
                Ok(from) => {
                    let site = site.for_image(&global, image, report.clone());
                    let ended = bake_one(site, &report, image, &from, &wish, &run, &permits, stop).await;
                    let became = match ended.result {
                        Ok(Outcome::Baked(image)) => Became::Baked(image),
                        Ok(Outcome::AlreadyBaked(image)) => Became::Found(image),
                        Err(error) => Became::Failed(error),
                    };
                    (became, ended.left, ended.kept)
                }
                Err(error) if *stop.borrow() => (Became::Failed(interrupted(error)), Vec::new(), Vec::new()),
                Err(error) => (Became::Skipped(error), Vec::new(), Vec::new()),
            };
            let (name, dir, log) = (image.name.clone(), image.dir.clone(), report.log_path());
            let baked = Baked { name, dir, asked, run, became, left, kept, log };
            id_file::keep(&baked.dir, baked.image().map(|image| &image.id), &report);
            report_result(&baked, &report, column.is_some());
            _ = sender.send(Some(baked.image().map(|image| image.id.clone())));
            baked
        })));
    }
    tasks.await;
    let mut all = Vec::new();
    for handle in handles {
        all.push(handle.await.expect("a bake does not panic"));
    }
    all
}

/// The base image of a definition, once its parent has an image.
async fn parent_image(image: &Definition, parent: Option<(String, Parent)>) -> Result<BaseRef> {
    let (name, mut parent) = match (&image.from, parent) {
        (From::Image(from), _) => return Ok(from.clone()),
        (From::Parent(_), Some(parent)) => parent,
        (From::Parent(dir), None) => bail!("{} is not among the definitions to bake", dir.display()),
    };
    match parent.wait_for(Option::is_some).await.as_deref() {
        Ok(Some(Some(id))) => Ok(BaseRef::Id(id.clone())),
        _ => Err(Kind::NotFound.error(format!("its parent {name} has no image"))),
    }
}

fn interrupted(error: Error) -> Error {
    Kind::Interrupted.error(format!("interrupted: {error}"))
}

#[allow(clippy::too_many_arguments)] // called once; a struct would only be destructured again
async fn bake_one(
    site: Result<Site>,
    report: &Report,
    image: &Definition,
    from: &BaseRef,
    wish: &Wish,
    run: &RunId,
    permits: &Semaphore,
    mut stop: watch::Receiver<bool>,
) -> Ended<Outcome> {
    let site = match site {
        Ok(site) => site,
        Err(error) => {
            report.failure(&error);
            return Ended { result: Err(error), left: Vec::new(), kept: Vec::new() };
        }
    };
    let _permit = permits.acquire().await.expect("the semaphore is never closed");
    let dir = std::path::absolute(&image.dir).unwrap_or_else(|_| image.dir.clone());
    report.log_to(&site.log(run), &format!("run {run} bakes {}", dir.display()));
    let stop = async move { _ = stop.wait_for(|stop| *stop).await };
    let whole = report.whole(&format!("baking {}", image.name));
    let mut ended = bake(&site, image, from, wish, run, stop).await;
    whole.ended(match &ended.result {
        Ok(Outcome::Baked(_)) => "baked",
        Ok(Outcome::AlreadyBaked(_)) => "already baked",
        Err(error) => Kind::of(error).name(),
    });
    for left in &mut ended.left {
        left.command = site.spelt(&left.command);
        report.warn(left.to_string());
    }
    for kept in &ended.kept {
        let inspect = site.spelt(&format!("oven shell {}", run.short()));
        let remove = site.spelt(&format!("oven sweep --kept --run {}", run.short()));
        report.note(format!("kept {kept}\n    inspect it: {inspect}\n    remove it:  {remove}"));
    }
    ended
}

/// The message after an interruption without leftovers.
pub const NOTHING_LEFT: &str = "interrupted; nothing was left behind";

/// Reports the end of a bake. For several bakes the summary has more detail. A failure was reported before the
/// clean-up.
fn report_result(baked: &Baked, report: &Report, several: bool) {
    match &baked.became {
        Became::Baked(image) => {
            report.times();
            report.note(format!("baked: {} ({})", image.id, image.name));
        }
        Became::Found(image) => {
            let text = format!("already baked: {} ({})", image.id, image.name);
            if several { report.detail(text) } else { report.note(text) }
        }
        Became::Skipped(error) => report.warn(format!("skipped: {error}")),
        Became::Failed(error)
            if Kind::of(error) == Kind::Interrupted && baked.left.is_empty() && !several =>
        {
            report.note(NOTHING_LEFT);
        }
        Became::Failed(_) => {}
    }
}
