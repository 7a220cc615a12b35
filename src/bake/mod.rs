//! Bakes one image in six steps. The compiler enforces that the disk is unmounted before it is committed: a mounted
//! [`Root`](crate::mount::Root) borrows the disk, and committing consumes it.

pub mod ami_id_file;
pub mod batch;
mod checkout;
mod commit;
pub mod download;
mod failed_step;
pub mod import;
mod lock;
mod mount;
pub mod options;
mod outcome;
pub mod planned_steps;
pub mod preflight;
pub mod provision;
mod register;
pub mod seal;
pub mod secrets;
pub mod target;

use crate::cloud::BaseRef;
use crate::definition::Definition;
use crate::ids::RunId;
use crate::site::Site;
use crate::undo::{self, Ended};
use options::BakeOptions;
pub use outcome::Outcome;
use std::future::Future;

/// The inputs of one bake: its definition, base image, site and options.
#[derive(Clone, Copy)]
pub struct Bake<'a> {
    pub site: &'a Site,
    pub image: &'a Definition,
    /// The base image. If the definition has a parent definition, this is the parent's image.
    pub from: &'a BaseRef,
    pub options: &'a BakeOptions,
    pub run: &'a RunId,
}

/// Bakes a definition, unless its image exists already. When the bake ends or is stopped, its local resources are
/// released first, and after that its temporary cloud resources are removed. [`Ended::leftovers`] lists the cloud
/// resources that could not be removed.
pub async fn bake(bake: &Bake<'_>, stop: impl Future<Output = ()>) -> Ended<Outcome> {
    undo::scope(bake.site.undo_policy(bake.options.keep_on_failure), stop, async |undo| {
        let target = target::resolve(bake).await?; //                                          1. resolve
        let _lock = lock::acquire(bake, &target).await?;
        if let Some(image) = target::existing(bake, &target).await? {
            return Ok(Outcome::AlreadyBaked(image));
        }
        preflight::check(bake, &target).await?;
        let secrets = secrets::collect(bake)?;
        let packages = download::download_packages(bake).await?;
        let disk = checkout::disk(bake, &target, &undo).await?; //                             2. check out
        let root = mount::root(bake, disk.device()).await?; //                                 3. mount: borrows the disk
        let provisioned = async {
            let work = provision::plan(bake, &target, packages, &root)?; //                    4. provision
            let runner = provision::runner(bake, &work, &secrets, &root)?;
            let done = async {
                let mut baseline = seal::baseline(&runner)?;
                let facts = provision::packages_and_scripts(&runner, &mut baseline).await?;
                seal::image(&runner, baseline).await?; //                                         clean and lint
                Ok(facts)
            };
            failed_step::handle(bake, &target, &runner, done.await)
        };
        let (root, facts) = mount::unless_failed(provisioned.await, root).await?;
        mount::release(bake, root).await?; //                                                     nothing uses the disk
        target.ensure_unchanged(bake)?;
        let snapshot = commit::snapshot(bake, disk, &undo).await?; //                          5. commit
        register::image(bake, target, facts, &snapshot, &undo).await //                        6. register
    })
    .await
}
