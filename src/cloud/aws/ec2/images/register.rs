//! Registering: the name is the compare-and-set. The call is sent once; after a lost answer the name tells.

use super::convert;
use super::convert::{filter, to_tags};
use super::documents::Draft;
use super::of;
use super::verify::{differences, mappings, missing_tags, other_billing};
use crate::cloud::aws::ec2::Ec2;
use crate::cloud::aws::ec2::client::call::Refused;
use crate::cloud::aws::ec2::client::errors::{CREATE_TAGS, Class, DESCRIBE_IMAGES, REGISTER_IMAGE};
use crate::cloud::ec2_rules::{check_description, check_image_name, is_id};
use crate::cloud::name_conflict::{Verdict, judge};
use crate::cloud::{Image, ImageSpec, ImageState, Tags, image_attributes, tag};
use crate::error::{Kind, hint_of};
use crate::ids::{ImageId, SnapshotId};
use crate::sys::poll::{Probe, until};
use crate::undo::Undo;
use anyhow::{Context, Error, Result};
use aws_sdk_ec2::types::{self, ResourceType};
use tokio::time::Instant;

/// An image counts as available when this many looks in a row, or side by side, found it so, each by connections of its
/// own: then other endpoints of EC2 know it, too.
const LOOKS: usize = 3;
/// How often tags that got lost are set again.
const REPAIRS: u32 = 3;
/// Other builders may take the name and let go of it; nobody does that for ever.
const ROUNDS: u32 = 5;

/// What an attempt to register came to.
enum Registered {
    New(ImageId),
    Taken(ImageId),
    /// The answer was lost, and nobody holds the name.
    Nothing(Refused),
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
        let draft = Draft::write(&self.0.options.documents, &spec.run, &spec.documents)?;
        let mut lost = None;
        for _ in 0..ROUNDS {
            let holder = match self.send_register(snapshot, spec, &tags).await? {
                Registered::Nothing(refused) => {
                    lost = Some(refused);
                    continue;
                }
                Registered::New(id) => {
                    let image = self.read_back(&id, snapshot, spec, &tags).await?;
                    if let Some(draft) = draft {
                        draft.keep(&id)?;
                    }
                    undo.forgive_on_failure();
                    return Ok(image);
                }
                Registered::Taken(id) => id,
            };
            if let Some(image) = self.adopt(&holder, spec).await? {
                undo.due_now();
                return Ok(image);
            }
        }
        Err(match lost {
            Some(refused) => Error::from(refused).context("nothing was registered, again and again"),
            None => Kind::Cloud.error(format!("the name {} is taken and freed again and again", spec.name)),
        })
    }

    async fn send_register(
        &self,
        snapshot: &SnapshotId,
        spec: &ImageSpec,
        tags: &Tags,
    ) -> Result<Registered> {
        let wish = &spec.attributes;
        let what = format!("{} of {snapshot}", spec.name);
        let sent = self.repeat(&REGISTER_IMAGE, &what, async || {
            let request = self
                .client()
                .register_image()
                .name(&spec.name)
                .set_description(Some(spec.description.clone()).filter(|text| !text.is_empty()))
                // EC2's defaults are i386 and paravirtual.
                .architecture(types::ArchitectureValues::from(spec.architecture.as_str()))
                .virtualization_type("hvm")
                .root_device_name(&spec.root_device)
                .set_block_device_mappings(Some(mappings(spec, snapshot)))
                .set_boot_mode(wish.boot_mode.as_deref().map(types::BootModeValues::from))
                .set_ena_support(wish.ena)
                .set_sriov_net_support(wish.sriov.clone())
                .set_tpm_support(wish.tpm.as_deref().map(types::TpmSupportValues::from))
                .set_imds_support(wish.imds.as_deref().map(types::ImdsSupportValues::from))
                // The snapshot has its tags since it was made: EC2 takes the image's alone here.
                .tag_specifications(convert::tagged(ResourceType::Image, tags));
            self.fly(&spec.run, &REGISTER_IMAGE, &what, request.send(), |_, _| ()).await
        });
        match sent.await {
            Ok(answer) => {
                let id = convert::id("ami", answer.image_id.as_deref())?;
                self.born(&id);
                Ok(Registered::New(ImageId(id)))
            }
            Err(refused) if refused.is("InvalidAMIName.Duplicate") => match self
                .holder(&refused, spec)
                .await?
            {
                Some(holder) => Ok(self.whose(holder, snapshot)),
                None => Err(Error::from(refused).context("the image that holds the name is not to be seen")),
            },
            Err(refused) if refused.class == Class::Lost => {
                // A second call is safe after this: the name would be refused.
                let end = Instant::now() + self.pace().look * 8;
                loop {
                    self.look_soon().await;
                    if let Some(holder) = self.named(&spec.name).await? {
                        return Ok(self.whose(holder, snapshot));
                    }
                    if Instant::now() >= end {
                        return Ok(Registered::Nothing(refused));
                    }
                }
            }
            Err(refused) => Err(refused.into()),
        }
    }

    /// Our own image, from a call whose answer was lost: its root is our snapshot, which nobody else has.
    fn whose(&self, holder: types::Image, snapshot: &SnapshotId) -> Registered {
        let id = ImageId(holder.image_id.clone().unwrap_or_default());
        if convert::root(&holder).and_then(|root| root.snapshot_id.as_deref()) == Some(snapshot.0.as_str()) {
            self.born(&id.0);
            return Registered::New(id);
        }
        Registered::Taken(id)
    }

    /// The image that holds the name, by the id in EC2's message, or by its name. It may be too new to be seen.
    async fn holder(&self, refused: &Refused, spec: &ImageSpec) -> Result<Option<types::Image>> {
        let id = refused
            .message
            .split(|c: char| !c.is_ascii_alphanumeric() && c != '-')
            .find(|word| is_id("ami", word));
        let id = id.map(|id| ImageId(id.to_owned()));
        let end = Instant::now() + self.pace().visible;
        loop {
            let found = match &id {
                Some(id) => self.look_at(id).await?,
                None => self.named(&spec.name).await?,
            };
            if found.is_some() || Instant::now() >= end {
                return Ok(found);
            }
            tokio::time::sleep(self.pace().longest.min(self.pace().look * 4)).await;
        }
    }

    /// Adopts the holder of a name that we wanted, or says why not. `None`: it went away while we waited for it.
    async fn adopt(&self, id: &ImageId, spec: &ImageSpec) -> Result<Option<Image>> {
        let mut holder = self.look_at(id).await?;
        // EC2 has named it just now: one stale answer is no proof that it is gone.
        if holder.is_none() {
            holder = self.settled(id).await?;
        }
        let mut refusals = 1;
        loop {
            let Some(found) = holder else { return Ok(None) };
            let Some(image) = of(&found) else {
                let hint = "Deregister it, or change the definition's name.";
                return Err(Kind::Cloud
                    .failure(format!("the name {} is taken by {id}", spec.name))
                    .hint(hint)
                    .into());
            };
            match judge(&image, spec) {
                Verdict::Adopt => return Ok(Some(image)),
                // Its tags may not show yet: another builder registered it just now.
                Verdict::Refuse(_) if refusals < LOOKS => {
                    refusals += 1;
                    holder = self.settled(id).await?;
                }
                Verdict::Refuse(error) => {
                    let text = format!("AMI name {} is already in use by AMI {id}", spec.name);
                    return Err(error.context(format!("InvalidAMIName.Duplicate: {text}")));
                }
                Verdict::Wait => holder = self.settled(id).await?,
            }
        }
    }

    /// Waits for our own image, and reads it back. One that is not what it was to be is deregistered.
    async fn read_back(
        &self,
        id: &ImageId,
        snapshot: &SnapshotId,
        spec: &ImageSpec,
        tags: &Tags,
    ) -> Result<Image> {
        let wrong = match self.available(id, tags).await? {
            Err(why) => why,
            Ok(image) => {
                let mut all = differences(&image, spec, snapshot);
                all.extend(other_billing(&image, spec));
                if all.is_empty() {
                    return of(&image)
                        .ok_or_else(|| Kind::Cloud.error(format!("EC2 describes {id} without its root")));
                }
                format!("it is not what it was to be: {}", all.join("; "))
            }
        };
        // Ours, and of no use: without it the name is free again, and the snapshot can be deleted.
        let Err(stays) = self.deregister(id).await else {
            return Err(Kind::Cloud.error(format!("{id} was deregistered again: {wrong}")));
        };
        // At least no bake may take it for a result.
        let mut spoilt = Tags::new();
        for key in
            [tag::FINGERPRINT, tag::CHECKSUM, tag::SOURCE].iter().filter(|key| tags.contains_key(**key))
        {
            spoilt.insert((*key).to_owned(), "refused".to_owned());
        }
        _ = self.tag(id, &spoilt).await;
        let mut hint =
            format!("Remove it: aws ec2 deregister-image --region {} --image-id {id}", self.region());
        if let Some(why) = hint_of(&stays) {
            hint = format!("{why} {hint}");
        }
        let text = format!("{id} is of no use ({wrong}), and cannot be deregistered ({stays:#})");
        Err(Kind::Cloud.failure(text).hint(hint).into())
    }

    /// The image, available and with all its tags; or why it never will be.
    async fn available(&self, id: &ImageId, tags: &Tags) -> Result<Result<types::Image, String>> {
        let (mut is_first, mut repairs, mut seen) = (true, 0, Instant::now());
        // At once: registering copies nothing, and what is not there yet is looked for again.
        until(&format!("the image {id}"), &self.pace().closely(self.pace().image), async || {
            let mut good = Vec::new();
            loop {
                // Side by side, but for one ahead where it was not there before.
                let looks = if good.is_empty() && !is_first { 1 } else { LOOKS - good.len() };
                is_first = false;
                for look in self.looks_anew(id, looks).await? {
                    let Some(image) = look else {
                        if seen.elapsed() >= self.pace().visible {
                            return Ok(Probe::Ready(Err("it is not to be seen".to_owned())));
                        }
                        return Ok(Probe::NotYet("not to be seen".to_owned()));
                    };
                    seen = Instant::now();
                    match convert::state(&image) {
                        ImageState::Pending => return Ok(Probe::NotYet(convert::state_text(&image))),
                        ImageState::Failed => {
                            return Ok(Probe::Ready(Err(format!("it is {}", convert::state_text(&image)))));
                        }
                        ImageState::Available => {}
                    }
                    let missing = missing_tags(&image, tags);
                    if !missing.is_empty() {
                        if repairs == REPAIRS {
                            let keys: Vec<&str> = missing.keys().map(String::as_str).collect();
                            return Ok(Probe::Ready(Err(format!("it lacks the tags {}", keys.join(", ")))));
                        }
                        repairs += 1;
                        if let Err(refused) = self.tag(id, &missing).await {
                            return Ok(Probe::Ready(Err(format!("it lacks its tags: {refused:#}"))));
                        }
                        return Ok(Probe::NotYet("without its tags".to_owned()));
                    }
                    good.push(image);
                }
                if good.len() == LOOKS
                    && let Some(image) = good.pop()
                {
                    return Ok(Probe::Ready(Ok(image)));
                }
            }
        })
        .await
    }

    /// Looks side by side.
    async fn looks_anew(&self, id: &ImageId, times: usize) -> Result<Vec<Option<types::Image>>> {
        if times == 0 {
            return Ok(Vec::new());
        }
        let (look, mut looks) =
            tokio::try_join!(self.look_anew(id), Box::pin(self.looks_anew(id, times - 1)))?;
        looks.push(look);
        Ok(looks)
    }

    /// A look by a client of its own.
    async fn look_anew(&self, id: &ImageId) -> Result<Option<types::Image>> {
        let wanted = filter("image-id", [id.0.as_str()]);
        // Anew for each try: credentials may have been renewed.
        let sent = self.call(&DESCRIBE_IMAGES, &id.0, |_| {
            self.new_client().describe_images().owners("self").filters(wanted.clone()).send()
        });
        Ok(sent.await?.images.unwrap_or_default().into_iter().next())
    }

    async fn tag(&self, id: &ImageId, tags: &Tags) -> Result<()> {
        let sent = self.call(&CREATE_TAGS, &id.0, |client| {
            client.create_tags().resources(&id.0).set_tags(Some(to_tags(tags))).send()
        });
        sent.await.map_err(Error::from).context("setting tags that got lost")?;
        Ok(())
    }
}
