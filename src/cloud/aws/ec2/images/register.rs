//! Registers images. In a region of an account, the name of an image is unique. So if a request is sent twice, EC2
//! registers only one image. If the response to a request is lost, oven searches for an image with the name before it
//! sends the request again.

use super::convert;
use super::convert::{filter, to_tags};
use super::documents::DocumentDraft;
use super::of;
use super::verify::{billing_difference, differences, mappings, missing_tags};
use crate::cloud::aws::ec2::Ec2;
use crate::cloud::aws::ec2::client::call::ApiError;
use crate::cloud::aws::ec2::client::errors::{CREATE_TAGS, DESCRIBE_IMAGES, ErrorClass, REGISTER_IMAGE};
use crate::cloud::ec2_rules::{check_description, check_image_name, is_id};
use crate::cloud::name_conflict::{ConflictResolution, resolve_conflict};
use crate::cloud::{Image, ImageSpec, ImageState, Tags, image_attributes, tag};
use crate::error::{Kind, hint_of};
use crate::ids::{ImageId, SnapshotId};
use crate::sys::poll::{PollAnswer, poll_until};
use crate::undo::Undo;
use anyhow::{Context, Error, Result};
use aws_sdk_ec2::types::{self, ResourceType};
use tokio::time::Instant;

/// oven waits until this number of polls have reported a new image as available. Each of these polls opens a new
/// connection, which can reach a different server of EC2. If all of them report the image, probably every server knows
/// it.
const POLLS: usize = 3;
/// The maximum number of times that oven sets the missing tags of a new image.
const MAX_TAG_REPAIRS: u32 = 3;
/// The maximum number of attempts to register an image. Another attempt is needed if another builder took the name and
/// freed it again. It is also needed if a response was lost and no image has the name.
const MAX_ATTEMPTS: u32 = 5;

/// The outcome of an attempt to register.
enum Registration {
    /// This run registered the image.
    New(ImageId),
    /// Another run's image, or an image that oven did not make, has the name.
    Taken(ImageId),
    /// The response was lost, and no image has the name.
    Unknown(ApiError),
}

impl Ec2 {
    pub(crate) async fn register_image(
        &self,
        snapshot: &SnapshotId,
        spec: &ImageSpec,
        undo: &Undo,
    ) -> Result<Image> {
        check_image_name(&spec.name)?;
        check_description(&spec.description)?;
        image_attributes::check(&spec.attributes, spec.architecture)?;
        let tags = self.owned(&spec.tags, &spec.run)?;
        let draft = DocumentDraft::write(&self.0.options.documents, &spec.run, &spec.documents)?;
        let mut lost = None;
        for _ in 0..MAX_ATTEMPTS {
            let holder = match self.send_register(snapshot, spec, &tags).await? {
                Registration::Unknown(refused) => {
                    lost = Some(refused);
                    continue;
                }
                Registration::New(id) => {
                    let image = self.read_back(&id, snapshot, spec, &tags).await?;
                    if let Some(draft) = draft {
                        draft.keep(&id)?;
                    }
                    undo.forgive_on_failure();
                    return Ok(image);
                }
                Registration::Taken(id) => id,
            };
            if let Some(image) = self.adopt(&holder, spec).await? {
                undo.make_all_due();
                return Ok(image);
            }
        }
        Err(match lost {
            Some(refused) => Error::from(refused)
                .context("the image was not registered, although the call was sent several times"),
            None => {
                Kind::Cloud.error(format!("other processes took and freed the name {} repeatedly", spec.name))
            }
        })
    }

    async fn send_register(
        &self,
        snapshot: &SnapshotId,
        spec: &ImageSpec,
        tags: &Tags,
    ) -> Result<Registration> {
        let attributes = &spec.attributes;
        let what = format!("{} of {snapshot}", spec.name);
        let sent = self.repeat(&REGISTER_IMAGE, &what, async || {
            let request = self
                .client()
                .register_image()
                .name(&spec.name)
                .set_description(Some(spec.description.clone()).filter(|text| !text.is_empty()))
                // The architecture and the virtualization type are set explicitly, because EC2's defaults are i386 and
                // paravirtual.
                .architecture(types::ArchitectureValues::from(spec.architecture.as_str()))
                .virtualization_type("hvm")
                .root_device_name(&spec.root_device)
                .set_block_device_mappings(Some(mappings(spec, snapshot)))
                .set_boot_mode(attributes.boot_mode.as_deref().map(types::BootModeValues::from))
                .set_ena_support(attributes.ena)
                .set_sriov_net_support(attributes.sriov.clone())
                .set_tpm_support(attributes.tpm.as_deref().map(types::TpmSupportValues::from))
                .set_imds_support(attributes.imds.as_deref().map(types::ImdsSupportValues::from))
                // RegisterImage accepts only tags for the image. The snapshot was tagged when it was created.
                .tag_specifications(convert::tag_specification(ResourceType::Image, tags));
            self.send_in_background(&spec.run, &REGISTER_IMAGE, &what, request.send(), |_, _| ()).await
        });
        match sent.await {
            Ok(answer) => {
                let id = convert::id("ami", answer.image_id.as_deref())?;
                self.born(&id);
                Ok(Registration::New(ImageId(id)))
            }
            Err(refused) if refused.is("InvalidAMIName.Duplicate") => {
                match self.holder(&refused, spec).await? {
                    Some(holder) => Ok(self.classify_holder(holder, snapshot)),
                    None => Err(Error::from(refused).context("the image that has the name is not visible")),
                }
            }
            Err(refused) if refused.class == ErrorClass::Ambiguous => {
                // The response was lost, so the image may exist. Searches for an image with the name. If there is none,
                // the caller sends the request again. This is safe, because EC2 never registers two images with the
                // same name.
                let end = Instant::now() + self.timeouts().first_poll * 8;
                loop {
                    self.wait_before_first_poll().await;
                    if let Some(holder) = self.named(&spec.name).await? {
                        return Ok(self.classify_holder(holder, snapshot));
                    }
                    if Instant::now() >= end {
                        return Ok(Registration::Unknown(refused));
                    }
                }
            }
            Err(refused) => Err(refused.into()),
        }
    }

    /// Determines which run registered `holder`, the image that has the name. A run is a single bake. If the image's
    /// root is this run's snapshot, this run registered the image, because no other run uses that snapshot. In this
    /// case, the response to an earlier request was lost.
    fn classify_holder(&self, holder: types::Image, snapshot: &SnapshotId) -> Registration {
        let id = ImageId(holder.image_id.clone().unwrap_or_default());
        if convert::root_mapping(&holder).and_then(|root| root.snapshot_id.as_deref())
            == Some(snapshot.0.as_str())
        {
            self.born(&id.0);
            return Registration::New(id);
        }
        Registration::Taken(id)
    }

    /// Finds the image that has the name. Uses the image's id if EC2's error message contains it, and the name
    /// otherwise. EC2 does not show a new image immediately, so this function waits until the image is visible.
    async fn holder(&self, refused: &ApiError, spec: &ImageSpec) -> Result<Option<types::Image>> {
        let id = refused
            .message
            .split(|c: char| !c.is_ascii_alphanumeric() && c != '-')
            .find(|word| is_id("ami", word));
        let id = id.map(|id| ImageId(id.to_owned()));
        let end = Instant::now() + self.timeouts().visible;
        loop {
            let found = match &id {
                Some(id) => self.describe_image(id).await?,
                None => self.named(&spec.name).await?,
            };
            if found.is_some() || Instant::now() >= end {
                return Ok(found);
            }
            tokio::time::sleep(self.timeouts().max_poll.min(self.timeouts().first_poll * 4)).await;
        }
    }

    /// Returns the existing image that has the wanted name. Fails if that image cannot be used as the result of this
    /// bake. Returns `None` if the image no longer exists.
    async fn adopt(&self, id: &ImageId, spec: &ImageSpec) -> Result<Option<Image>> {
        let mut holder = self.describe_image(id).await?;
        // EC2 has just reported this id, so a response without the image may be stale. `settled` polls several times
        // before it reports that the image does not exist.
        if holder.is_none() {
            holder = self.settled(id).await?;
        }
        let mut refusals = 1;
        loop {
            let Some(found) = holder else { return Ok(None) };
            let Some(image) = of(&found) else {
                let hint = "Deregister that image, or change the definition's `name`.";
                return Err(Kind::Cloud
                    .failure(format!("the name {} is used by {id}", spec.name))
                    .hint(hint)
                    .into());
            };
            match resolve_conflict(&image, spec) {
                ConflictResolution::Adopt => return Ok(Some(image)),
                // Perhaps another builder has just registered the image, and its tags are not visible yet. So the image
                // is described again.
                ConflictResolution::Refuse(_) if refusals < POLLS => {
                    refusals += 1;
                    holder = self.settled(id).await?;
                }
                ConflictResolution::Refuse(error) => {
                    let text = format!("AMI name {} is already in use by AMI {id}", spec.name);
                    return Err(error.context(format!("InvalidAMIName.Duplicate: {text}")));
                }
                ConflictResolution::Wait => holder = self.settled(id).await?,
            }
        }
    }

    /// Waits for the image that this run registered, and verifies it. If the image differs from the specification,
    /// deregisters it.
    async fn read_back(
        &self,
        id: &ImageId,
        snapshot: &SnapshotId,
        spec: &ImageSpec,
        tags: &Tags,
    ) -> Result<Image> {
        let problem = match self.wait_until_available(id, tags).await? {
            Err(why) => why,
            Ok(image) => {
                let mut all = differences(&image, spec, snapshot);
                all.extend(billing_difference(&image, spec));
                if all.is_empty() {
                    return of(&image).ok_or_else(|| {
                        Kind::Cloud.error(format!("EC2's description of {id} lacks the root volume"))
                    });
                }
                format!("it differs from the specification: {}", all.join("; "))
            }
        };
        // Deregisters the unusable image, so that its name is free again and its snapshot can be deleted.
        let Err(error) = self.deregister(id).await else {
            return Err(Kind::Cloud.error(format!("{id} was deregistered again, because {problem}")));
        };
        // The image still exists. Its tags are changed, so that no later bake uses this image as its result.
        let mut invalid = Tags::new();
        for key in
            [tag::FINGERPRINT, tag::CHECKSUM, tag::SOURCE].iter().filter(|key| tags.contains_key(**key))
        {
            invalid.insert((*key).to_owned(), "refused".to_owned());
        }
        _ = self.tag(id, &invalid).await;
        let mut hint =
            format!("Deregister it: aws ec2 deregister-image --region {} --image-id {id}", self.region());
        if let Some(why) = hint_of(&error) {
            hint = format!("{why} {hint}");
        }
        let text = format!("{id} is unusable ({problem}), and deregistering it failed ({error:#})");
        Err(Kind::Cloud.failure(text).hint(hint).into())
    }

    /// Waits until the image is available and has all its tags. `Ok(Err(…))` says why the image is unusable.
    async fn wait_until_available(&self, id: &ImageId, tags: &Tags) -> Result<Result<types::Image, String>> {
        let (mut is_first, mut repairs, mut seen) = (true, 0, Instant::now());
        // There is no pause before the first polls. EC2 copies no data to register an image, so the image can be
        // available immediately.
        poll_until(
            &format!("the image {id}"),
            &self.timeouts().frequent_polls(self.timeouts().image),
            async || {
                let mut confirmed = Vec::new();
                loop {
                    // At first, all polls are made concurrently. If one of them does not report the image as available,
                    // oven pauses and then makes a single poll. When a single poll reports the image as available, the
                    // other polls are made concurrently.
                    let polls = if confirmed.is_empty() && !is_first { 1 } else { POLLS - confirmed.len() };
                    is_first = false;
                    for polled in self.poll_concurrently(id, polls).await? {
                        let Some(image) = polled else {
                            if seen.elapsed() >= self.timeouts().visible {
                                return Ok(PollAnswer::Ready(Err("it is not visible".to_owned())));
                            }
                            return Ok(PollAnswer::NotYet("not visible".to_owned()));
                        };
                        seen = Instant::now();
                        match convert::state(&image) {
                            ImageState::Pending => {
                                return Ok(PollAnswer::NotYet(convert::state_text(&image)));
                            }
                            ImageState::Failed => {
                                return Ok(PollAnswer::Ready(Err(format!(
                                    "it is {}",
                                    convert::state_text(&image)
                                ))));
                            }
                            ImageState::Available => {}
                        }
                        let missing = missing_tags(&image, tags);
                        if !missing.is_empty() {
                            if repairs == MAX_TAG_REPAIRS {
                                let keys: Vec<&str> = missing.keys().map(String::as_str).collect();
                                return Ok(PollAnswer::Ready(Err(format!(
                                    "it lacks the tags {}",
                                    keys.join(", ")
                                ))));
                            }
                            repairs += 1;
                            if let Err(refused) = self.tag(id, &missing).await {
                                return Ok(PollAnswer::Ready(Err(format!(
                                    "its missing tags cannot be set: {refused:#}"
                                ))));
                            }
                            return Ok(PollAnswer::NotYet("without its tags".to_owned()));
                        }
                        confirmed.push(image);
                    }
                    if confirmed.len() == POLLS
                        && let Some(image) = confirmed.pop()
                    {
                        return Ok(PollAnswer::Ready(Ok(image)));
                    }
                }
            },
        )
        .await
    }

    /// Makes `times` concurrent polls of the image.
    async fn poll_concurrently(&self, id: &ImageId, times: usize) -> Result<Vec<Option<types::Image>>> {
        if times == 0 {
            return Ok(Vec::new());
        }
        let (polled, mut polls) =
            tokio::try_join!(self.poll_with_new_client(id), Box::pin(self.poll_concurrently(id, times - 1)))?;
        polls.push(polled);
        Ok(polls)
    }

    /// Polls the image with a new client, which opens a new connection.
    async fn poll_with_new_client(&self, id: &ImageId) -> Result<Option<types::Image>> {
        let wanted = filter("image-id", [id.0.as_str()]);
        // Each attempt makes its own client, so that it uses the current credentials.
        let sent = self.call(&DESCRIBE_IMAGES, &id.0, |_| {
            self.new_client().describe_images().owners("self").filters(wanted.clone()).send()
        });
        Ok(sent.await?.images.unwrap_or_default().into_iter().next())
    }

    async fn tag(&self, id: &ImageId, tags: &Tags) -> Result<()> {
        let sent = self.call(&CREATE_TAGS, &id.0, |client| {
            client.create_tags().resources(&id.0).set_tags(Some(to_tags(tags))).send()
        });
        sent.await.map_err(Error::from).context("setting missing tags")?;
        Ok(())
    }
}
