//! Snapshots. A snapshot has the volume's content at the time of the call, and is `pending` after that.

use super::{Ask, Ctx, internal, shapes, tag_specifications};
use crate::direct::{NO_VOLUME, copied};
use crate::faults::Turn;
use crate::iam::Target;
use crate::refusal::{Result, no};
use crate::world::{Snapshot, Tags, now};
use crate::xml::Xml;
use oven::ids::{RunId, SnapshotId, VolumeId};

pub async fn create(ctx: &Ctx, mut ask: Ask) -> Result<Xml> {
    let p = &mut ask.params;
    let (id, description) = (p.required("VolumeId")?, p.text("Description").unwrap_or_default());
    let tags = tag_specifications(p, "snapshot")?;
    if description.chars().count() > 255 {
        no!("InvalidParameterValue", "Value for parameter description is longer than 255 characters");
    }
    let volume = {
        let state = ctx.state();
        let (now, none) = (now(), Tags::new());
        let volume = state.world.volume(&id, now);
        let of = volume.as_ref().map_or(&none, |v| &v.common.tags);
        ask.permitted(&state, &[Target::new(&id, of), Target::made("snapshot", &tags)])?;
        let volume = volume?;
        if !matches!(volume.state(now), "available" | "in-use") {
            no!("IncorrectState", "The volume '{id}' is in the '{}' state.", volume.state(now));
        }
        let limits = &state.options.limits;
        let snapshots = state.world.snapshots.values().filter(|s| !s.common.is_gone(now));
        if snapshots.clone().filter(|s| !s.common.seeded).count() >= limits.snapshots {
            no!("SnapshotLimitExceeded", "Maximum allowed snapshot count exceeded.");
        }
        if snapshots.filter(|s| s.volume == id && s.common.is_pending(now)).count()
            >= limits.pending_snapshots
        {
            no!(
                "ConcurrentSnapshotLimitExceeded",
                "Maximum allowed in-progress snapshots for a single volume exceeded."
            );
        }
        let between = limits.between_snapshots.as_millis() as u64;
        // Failed and deleted snapshots also count.
        if volume.snapshots_at.last().is_some_and(|at| now < at + between) {
            no!(
                "SnapshotCreationPerVolumeRateExceeded",
                "The maximum per volume CreateSnapshot request rate has been exceeded. Use an increasing or variable sleep interval between requests."
            );
        }
        ask.really()?;
        volume.clone()
    };
    let run = RunId("ec2-server".to_owned());
    let made = ctx
        .region
        .snapshot_attached(&VolumeId(id.clone()), &run, &Default::default())
        .await
        .map_err(internal)?;
    let mut state = ctx.state();
    let delay = state.options.delays.snapshot;
    let snapshot = Snapshot {
        common: state.common(&made.0, tags, delay, ask.turn),
        volume: id.clone(),
        size: volume.size,
        description,
        encrypted: volume.kind.encrypted,
        key: volume.kind.key,
        product_codes: volume.product_codes,
        ..Snapshot::default()
    };
    state.change(|world| {
        if let Some(volume) = world.volumes.get_mut(&id) {
            volume.snapshots_at.push(snapshot.common.created);
        }
        world.snapshots.insert(made.0, snapshot.clone());
    });
    let mut xml = Xml::default();
    shapes::snapshot(&mut xml, &snapshot, now());
    Ok(xml)
}

/// Copies a snapshot within the region. EC2 has no client token for this call.
pub async fn copy(ctx: &Ctx, mut ask: Ask) -> Result<Xml> {
    let p = &mut ask.params;
    let (region, source) = (p.required("SourceRegion")?, p.required("SourceSnapshotId")?);
    let (description, destination) = (p.text("Description").unwrap_or_default(), p.text("DestinationRegion"));
    // The parameter is for copies from another region, which this server does not support.
    p.text("PresignedUrl");
    let (encrypted, key) = (p.boolean("Encrypted")?, p.text("KmsKeyId"));
    let tags = tag_specifications(p, "snapshot")?;
    if description.chars().count() > 255 {
        no!("InvalidParameterValue", "Value for parameter description is longer than 255 characters");
    }
    if encrypted == Some(false) {
        no!("InvalidParameterValue", "Value (false) for parameter Encrypted is invalid.");
    }
    if key.is_some() && encrypted.is_none() {
        no!(
            "InvalidParameterDependency",
            "The parameter KmsKeyId requires the parameter Encrypted to be set."
        );
    }
    let (original, turn) = {
        let state = ctx.state();
        let (now, none) = (now(), Tags::new());
        let options = &state.options;
        let original = state.world.snapshot(&source, now);
        let of = original.as_ref().map_or(&none, |s| &s.common.tags);
        ask.permitted(&state, &[Target::new(&source, of), Target::made("snapshot", &tags)])?;
        if region != options.region || destination.is_some_and(|other| other != options.region) {
            no!("InvalidParameterValue", "This server has the region {} alone.", options.region);
        }
        let original = original?;
        if !original.is_usable(&options.account) {
            no!("InvalidSnapshot.NotFound", "The snapshot '{source}' does not exist.");
        }
        if original.state(now) != "completed" {
            no!("IncorrectState", "Snapshot {source} is in invalid state - {}", original.state(now));
        }
        let snapshots = state.world.snapshots.values().filter(|s| !s.common.is_gone(now));
        if snapshots.clone().filter(|s| !s.common.seeded).count() >= options.limits.snapshots {
            no!("SnapshotLimitExceeded", "Maximum allowed snapshot count exceeded.");
        }
        if snapshots.filter(|s| s.copy && s.common.is_pending(now)).count() >= options.limits.copies {
            no!("ResourceLimitExceeded", "Too many snapshot copies in progress.");
        }
        ask.really()?;
        // The key is checked later. So the call succeeds, but the copy fails.
        let usable = options.may_use_key(key.as_deref()) && options.may_use_key(original.key.as_deref());
        (original.clone(), ask.turn.or((!usable).then_some(Turn::Failed)))
    };
    let id = copied(ctx, &source, original.size).await?;
    let mut state = ctx.state();
    let delay = state.options.delays.copying;
    let encrypted = original.encrypted || encrypted == Some(true) || state.options.direct.encrypts;
    // If the call has no key, the copy gets the account's own key, and not the original's key.
    let own = encrypted.then(|| state.options.default_key());
    let snapshot = Snapshot {
        common: state.common(&id, tags.clone(), delay, turn),
        volume: NO_VOLUME.to_owned(),
        size: original.size,
        description,
        encrypted,
        key: key.or(own),
        product_codes: original.product_codes,
        copy: true,
        ..Snapshot::default()
    };
    state.change(|world| world.snapshots.insert(id.clone(), snapshot));
    let mut xml = Xml::default();
    xml.text("snapshotId", id);
    shapes::tags(&mut xml, &tags);
    Ok(xml)
}

pub async fn delete(ctx: &Ctx, mut ask: Ask) -> Result<Xml> {
    let id = ask.params.required("SnapshotId")?;
    check_deletable(ctx, &ask, &id)?;
    remove(ctx, &id).await?;
    let mut xml = Xml::default();
    xml.text("return", true);
    Ok(xml)
}

fn check_deletable(ctx: &Ctx, ask: &Ask, id: &str) -> Result<()> {
    let state = ctx.state();
    let (now, none) = (now(), Tags::new());
    let snapshot = state.world.snapshot(id, now);
    ask.permitted(&state, &[Target::new(id, snapshot.as_ref().map_or(&none, |s| &s.common.tags))])?;
    if snapshot?.common.owner != state.options.account {
        no!("UnauthorizedOperation", "You are not authorized to perform this operation.");
    }
    if let Some(image) = state.world.using(id, now).next() {
        no!("InvalidSnapshot.InUse", "The snapshot {id} is currently in use by {}", image.common.id);
    }
    ask.really()
}

/// Deletes a snapshot and its data.
pub async fn remove(ctx: &Ctx, id: &str) -> Result<()> {
    ctx.region.delete_snapshot(&SnapshotId(id.to_owned())).await.map_err(internal)?;
    ctx.known.forget(id);
    ctx.state().change(|world| {
        if let Some(snapshot) = world.snapshots.get_mut(id) {
            snapshot.common.gone_at = Some(now());
        }
    });
    Ok(())
}
