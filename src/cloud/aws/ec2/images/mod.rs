//! Describes, finds and replaces images.

pub mod base;
pub(crate) mod convert;
pub mod documents;
pub mod register;
pub mod verify;

use super::Ec2;
use super::client::call::{ApiError, ok_if_already_done};
use super::client::errors::{Action, DELETE_SNAPSHOT, DEREGISTER_IMAGE, DESCRIBE_IMAGES, DESCRIBE_SNAPSHOTS};
use crate::cloud::ec2_rules::is_id;
use crate::cloud::name_conflict::is_replaceable;
use crate::cloud::{BakeKey, Image, ImageState, tag};
use crate::error::Kind;
use crate::ids::{ImageId, SnapshotId};
use crate::sys::poll::{PollAnswer, poll_until};
use anyhow::{Context, Result};
use aws_sdk_ec2::operation::describe_images::builders::DescribeImagesFluentBuilder;
use aws_sdk_ec2::types;
use convert::{filter, tag_filter};
use std::time::Duration;

/// The number of results per page, which is EC2's maximum. EC2 throttles a call sooner if the call sets no page size.
pub(crate) const PAGE: i32 = 1000;
/// The maximum time for which EC2 still regards a snapshot as used after its image was deregistered.
const RELEASE_WINDOW: Duration = Duration::from_secs(30);

pub(crate) use convert::image as of;

impl Ec2 {
    /// Calls DescribeImages for one page after the other, and returns all images.
    pub(crate) async fn describe_images(
        &self,
        action: &'static Action,
        what: &str,
        build: impl Fn(DescribeImagesFluentBuilder) -> DescribeImagesFluentBuilder,
    ) -> Result<Vec<types::Image>, ApiError> {
        let (mut all, mut token) = (Vec::new(), None::<String>);
        loop {
            let send = |client: &aws_sdk_ec2::Client| {
                build(client.describe_images()).set_next_token(token.clone()).send()
            };
            let page = self.call(action, what, send).await?;
            all.extend(page.images.unwrap_or_default());
            token = page.next_token.filter(|token| !token.is_empty());
            if token.is_none() {
                return Ok(all);
            }
        }
    }

    /// Describes images of this account.
    pub(crate) async fn own_images(
        &self,
        what: &str,
        filters: &[types::Filter],
    ) -> Result<Vec<types::Image>, ApiError> {
        self.describe_images(&DESCRIBE_IMAGES, what, |call| {
            call.owners("self").set_filters(Some(filters.to_vec()))
        })
        .await
    }

    /// Returns an image of this account by its id; `None` if EC2 does not show it.
    pub(crate) async fn describe_image(&self, id: &ImageId) -> Result<Option<types::Image>, ApiError> {
        // The id is passed as a filter. If it were passed as an id, EC2 would report an unknown id as an error, and the
        // call would be retried.
        let found = self.own_images(&id.0, &[filter("image-id", [id.0.as_str()])]).await?;
        Ok(found.into_iter().next())
    }

    pub(crate) async fn find_baked(&self, key: &BakeKey) -> Result<Option<Image>> {
        let mut filters = vec![
            tag_filter(tag::CHECKSUM, &key.checksum),
            filter("architecture", [key.architecture.as_str()]),
            filter("state", ["available", "pending"]),
        ];
        filters.extend(key.fingerprint.as_ref().map(|print| tag_filter(tag::FINGERPRINT, print)));
        let found = self.own_images("", &filters).await.map_err(anyhow::Error::from);
        let found = found.context("looking for an image of this definition")?;
        // Each image is compared with the key, because EC2 might have ignored a filter.
        let matches_key = |image: &Image| {
            let has = |key: &str, value: &String| image.tags.get(key) == Some(value);
            image.architecture == key.architecture
                && has(tag::CHECKSUM, &key.checksum)
                && key.fingerprint.as_ref().is_none_or(|print| has(tag::FINGERPRINT, print))
        };
        let mut found: Vec<Image> = found.iter().filter_map(of).filter(matches_key).collect();
        found.sort_by(|a, b| a.created.cmp(&b.created));
        if let Some(newest) = found.iter().rfind(|image| image.state == ImageState::Available) {
            return Ok(Some(newest.clone()));
        }
        // No image is available. A pending image is one that another bake is registering. Waits for the newest pending
        // image. If it does not become available, waits for the next older one.
        while let Some(pending) = found.pop() {
            if pending.state != ImageState::Pending {
                continue;
            }
            let settled = self.settled(&pending.id).await?;
            if let Some(image) = settled.as_ref().and_then(of).filter(|i| i.state == ImageState::Available) {
                return Ok(Some(image));
            }
        }
        Ok(None)
    }

    /// Waits until another builder's image is no longer pending. Returns `None` if the image was deregistered in the
    /// meantime.
    pub(crate) async fn settled(&self, id: &ImageId) -> Result<Option<types::Image>> {
        self.wait_before_first_poll().await;
        let mut absent = 0;
        poll_until(&format!("the image {id}"), &self.timeouts().until(self.timeouts().image), async || {
            let Some(image) = self.describe_image(id).await? else {
                // An answer without the image may be stale. The image counts as deregistered only after three such
                // answers in a row.
                absent += 1;
                return Ok(if absent < 3 {
                    PollAnswer::NotYet("not visible".to_owned())
                } else {
                    PollAnswer::Ready(None)
                });
            };
            absent = 0;
            Ok(match convert::state(&image) {
                ImageState::Pending => PollAnswer::NotYet(convert::state_text(&image)),
                _ => PollAnswer::Ready(Some(image)),
            })
        })
        .await
    }

    /// Returns the images that oven made in this account, oldest first. If `family` is given, returns only the images
    /// of definitions with this `name`.
    pub(crate) async fn find_own_images(&self, family: Option<&str>) -> Result<Vec<Image>> {
        let wanted = match family {
            Some(family) => tag_filter(tag::NAME, family),
            None => filter("tag-key", [tag::RUN]),
        };
        let found = self.describe_images(&DESCRIBE_IMAGES, family.unwrap_or(""), |call| {
            call.owners("self").filters(wanted.clone()).max_results(PAGE)
        });
        let mut images: Vec<Image> = found.await?.iter().filter_map(of).collect();
        images.sort_by(|a, b| a.created.cmp(&b.created));
        Ok(images)
    }

    pub(crate) async fn find_own_image(&self, id: &ImageId) -> Result<Image> {
        let missing = || Kind::NotFound.error(format!("this account has no image {id} in {}", self.region()));
        if !is_id("ami", &id.0) {
            return Err(missing());
        }
        self.describe_image(id).await?.as_ref().and_then(of).ok_or_else(missing)
    }

    /// Returns the image of this account that has this name.
    pub(crate) async fn named(&self, name: &str) -> Result<Option<types::Image>, ApiError> {
        let mut exact = String::new();
        for c in name.chars() {
            if matches!(c, '*' | '?' | '\\') {
                exact.push('\\');
            }
            exact.push(c);
        }
        let found = self.own_images(name, &[filter("name", [exact])]).await?;
        Ok(found.into_iter().find(|image| image.name.as_deref() == Some(name)))
    }

    pub(crate) async fn deregister(&self, id: &ImageId) -> Result<()> {
        let sent =
            self.call(&DEREGISTER_IMAGE, &id.0, |client| client.deregister_image().image_id(&id.0).send());
        ok_if_already_done(sent.await)?;
        Ok(())
    }

    pub(crate) async fn replace(&self, name: &str) -> Result<Option<ImageId>> {
        let Some(found) = self.named(name).await? else { return Ok(None) };
        let Some(image) = of(&found).filter(is_replaceable) else {
            let id = found.image_id.as_deref().unwrap_or("?");
            let text = format!(
                "{id} has the name {name}, but oven replaces only images that it created itself and that failed"
            );
            return Err(Kind::Cloud.error(text));
        };
        self.deregister(&image.id).await.with_context(|| format!("deregistering {}", image.id))?;
        if is_id("snap", &image.snapshot.0) {
            self.delete_own_snapshot(&image.snapshot)
                .await
                .with_context(|| format!("deleting {}", image.snapshot))?;
        }
        Ok(Some(image.id))
    }

    /// Deletes a snapshot if it has oven's tags and no image uses it.
    async fn delete_own_snapshot(&self, snapshot: &SnapshotId) -> Result<()> {
        let id = snapshot.0.as_str();
        let wanted = [filter("snapshot-id", [id]), filter("tag-key", [tag::RUN])];
        let described = self.call(&DESCRIBE_SNAPSHOTS, id, |client| {
            client.describe_snapshots().owner_ids("self").set_filters(Some(wanted.to_vec())).send()
        });
        if described.await?.snapshots().is_empty() {
            return Ok(());
        }
        let end = tokio::time::Instant::now() + RELEASE_WINDOW.min(self.timeouts().lost_answer_window);
        loop {
            match ok_if_already_done(
                self.call(&DELETE_SNAPSHOT, id, |client| client.delete_snapshot().snapshot_id(id).send())
                    .await,
            ) {
                // EC2 returns this error for a short time after the image was deregistered. It also returns this error
                // if another image uses the snapshot. Then the snapshot is not deleted.
                Err(refused) if refused.is("InvalidSnapshot.InUse") => {
                    if tokio::time::Instant::now() >= end {
                        return Ok(());
                    }
                    self.wait_before_first_poll().await;
                }
                result => return Ok(result?),
            }
        }
    }
}
