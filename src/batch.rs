//! Several bakes: parents before children, independent ones side by side.

use crate::bake::{Outcome, bake};
use crate::cli::{Global, Wish};
use crate::cloud::{BaseRef, ImageId, RunId};
use crate::definition::From;
use crate::error::Kind;
use crate::order::Order;
use crate::site::Site;
use crate::undo::{Ended, Left};
use anyhow::Result;
use std::path::PathBuf;
use std::rc::Rc;
use tokio::sync::{Semaphore, watch};

/// What became of one definition.
#[derive(Debug)]
pub struct Baked {
    pub name: String,
    pub dir: PathBuf,
    /// The user named it; the others are only parents of those.
    pub asked: bool,
    pub run: RunId,
    pub result: Result<Outcome>,
    pub left: Vec<Left>,
    pub kept: Vec<String>,
}

/// What children wait for: nothing yet, or the parent's image (`None` if it has none).
type Parent = watch::Receiver<Option<Option<ImageId>>>;

/// Bakes all definitions of an order, `jobs` at a time. `--force` concerns the named ones alone.
pub async fn bake_all(
    site: &Site,
    global: &Global,
    order: Order,
    wish: &Wish,
    jobs: usize,
    stop: watch::Receiver<bool>,
) -> Vec<Baked> {
    let (order, turns) = (Rc::new(order), Rc::new(Semaphore::new(jobs)));
    let several = order.images.len() > 1;
    let tasks = tokio::task::LocalSet::new();
    let mut parents: Vec<Parent> = Vec::new();
    let mut handles = Vec::new();
    for (i, image) in order.images.iter().enumerate() {
        let (told, heard) = watch::channel(None);
        parents.push(heard);
        let parent = order.parent[i].map(|p| parents[p].clone());
        let asked = order.named[i];
        let wish = Wish { force: wish.force && asked, ..wish.clone() };
        let (site, order, turns, stop, global) =
            (site.clone(), order.clone(), turns.clone(), stop.clone(), global.clone());
        let report = site.report.of(&image.name, several);
        handles.push(tasks.spawn_local(async move {
            let (image, run) = (&order.images[i], RunId::new());
            let ended = match site.for_image(&global, image, report) {
                Ok(site) => one(&site, &order, i, &wish, &run, parent, &turns, stop).await,
                Err(error) => Ended { result: Err(error), left: Vec::new(), kept: Vec::new() },
            };
            let id = ended.result.as_ref().ok().map(|outcome| outcome.image().id.clone());
            _ = told.send(Some(id));
            let Ended { result, left, kept } = ended;
            Baked { name: image.name.clone(), dir: image.dir.clone(), asked, run, result, left, kept }
        }));
    }
    tasks.await;
    let mut all = Vec::new();
    for handle in handles {
        all.push(handle.await.expect("a bake does not panic"));
    }
    all
}

#[allow(clippy::too_many_arguments)] // one call, and a struct for it would only be taken apart again
async fn one(
    site: &Site,
    order: &Order,
    i: usize,
    wish: &Wish,
    run: &RunId,
    parent: Option<Parent>,
    turns: &Semaphore,
    mut stop: watch::Receiver<bool>,
) -> Ended<Outcome> {
    let image = &order.images[i];
    let fail = |error| Ended { result: Err(error), left: Vec::new(), kept: Vec::new() };
    let from = match (&image.from, parent) {
        (From::Image(from), _) => from.clone(),
        (From::Parent(dir), parent) => match parent_image(parent).await {
            Some(id) => BaseRef::Id(id),
            None => {
                let message =
                    format!("{} stands on {}, which was not baked", image.dir.display(), dir.display());
                let error = Kind::NotFound.error(message);
                site.report.failure(&error);
                return fail(error);
            }
        },
    };
    let Ok(_turn) = turns.acquire().await else { return fail(Kind::Interrupted.error("interrupted")) };
    if let Err(error) = site.report.log_to(&site.log(run)) {
        site.report.warn(format!("no log file: {}: {error}", site.log(run).display()));
    }
    let ended =
        bake(site, image, &from, wish, run, async move { _ = stop.wait_for(|stop| *stop).await }).await;
    tell(site, run, &ended);
    ended
}

async fn parent_image(parent: Option<Parent>) -> Option<ImageId> {
    let mut parent = parent?;
    let known = parent.wait_for(Option::is_some).await.ok()?;
    known.clone().flatten()
}

/// What people see at the end of a bake. The failure itself was told before the clean-up began.
fn tell(site: &Site, run: &RunId, ended: &Ended<Outcome>) {
    let report = &site.report;
    match &ended.result {
        Ok(Outcome::AlreadyBaked(image)) => {
            report.note(format!("already baked: {} ({})", image.id, image.name))
        }
        Ok(Outcome::Baked(image)) => {
            report.table();
            report.note(format!("baked: {} ({})", image.id, image.name));
        }
        Err(_) => report.note(format!("the log of the run: {}", site.log(run).display())),
    }
    for left in &ended.left {
        report.warn(left.to_string());
    }
    for kept in &ended.kept {
        report.note(format!(
            "kept {kept}: look at it by `oven shell {0}`, remove it by `oven sweep --run {0} --kept`",
            run.short()
        ));
    }
}
