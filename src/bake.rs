//! The story of one image, in six steps. The compiler guards their order: each takes what only the one before it gives,
//! and a mounted [`Root`] borrows its disk, so that committing it before `close` does not compile.

use crate::cli::Wish;
use crate::cloud::{BaseRef, Image, RunId};
use crate::definition::Definition;
use crate::root::{Root, execute};
use crate::site::Site;
use crate::undo::{self, Ended};
use crate::{ask, turn};
use anyhow::Context;
use std::future::Future;

/// How a bake ended well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Baked(Image),
    /// The image of this fingerprint existed, or another builder was first.
    AlreadyBaked(Image),
}

/// Bakes a definition on the image that `from` names, unless that was done already. What is local is released when the
/// story ends or is stopped; what the cloud holds for it is removed after that, and told in [`Ended::left`].
pub async fn bake(
    site: &Site,
    image: &Definition,
    from: &BaseRef,
    wish: &Wish,
    run: &RunId,
    stop: impl Future<Output = ()>,
) -> Ended<Outcome> {
    undo::scope(site.policy(wish), stop, async |undo| {
        let base = site.resolve(image, from).await?; //                                        1. resolve
        let attributes = ask::attributes(image, &base)?;
        let inputs = ask::inputs(site, image, &base)?;
        let _turn = turn::take(site, &inputs).await?; //                  one bake of a fingerprint on this host
        if let Some(found) = ask::find(site, &inputs, wish).await? {
            return Ok(Outcome::AlreadyBaked(found));
        }
        ask::ensure_possible(site, image, &inputs, &base, wish, run).await?;
        let secrets = site.secrets(image)?;
        let whole = site.download(image).await?; //                                       packages by URL
        let disk = site.checkout(&base, image, wish, run, &undo).await?; //                    2. check out
        let root = Root::mount(disk.device(), &site.scratch(run)?, &ask::mount(image), &site.report).await?; // 3. mount
        let (distro, claims) = ask::distro(site, image, &root.os_release()?)?; //              4. provision
        let job = ask::job(&whole, &base, &claims, &root, &site.settings)?;
        let plan = distro.plan(&job)?;
        let facts = execute::execute(&root, &site.work(&whole, &site.kept(&base)?, &plan, &secrets)).await?;
        site.close(root).await?; //                                                               proven released
        inputs.ensure_unchanged(image).context("reading the definition again")?;
        let snapshot = site.commit(disk, &undo).await?; //                                     5. commit
        let spec = ask::image(image, &base, attributes, &inputs, facts, run, wish);
        Ok(Outcome::of(site.register(&snapshot, &spec, &undo).await?, run)) //                 6. register
    })
    .await
}

impl Outcome {
    fn of(image: Image, run: &RunId) -> Self {
        if image.made_by(run) { Self::Baked(image) } else { Self::AlreadyBaked(image) }
    }

    pub fn image(&self) -> &Image {
        match self {
            Self::Baked(image) | Self::AlreadyBaked(image) => image,
        }
    }
}
