//! Attaches volumes on the builder: as loop devices, or as disks in a guest.

use crate::actions::{Ctx, internal, volumes_remove};
use crate::faults::Turn;
use crate::options::AttachAs;
use crate::qmp::Qmp;
use crate::refusal::Result;
use crate::world::{Attachment, Phase, now};
use anyhow::Context;
use oven::cloud::Volumes;
use oven::device::Device;
use oven::ids::VolumeId;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;
use tokio::time::sleep;

/// The device of an attached volume.
pub enum Held {
    Loop(Device),
    Guest { guest: Rc<Qmp>, name: String, file: File },
}

/// The guests by instance.
pub type Guests = BTreeMap<String, Rc<Qmp>>;

/// A volume whose device is not released within this time is `busy`.
const BUSY_AFTER: Duration = Duration::from_secs(1);
/// The pause between two checks of a loop device.
const LOOK: Duration = Duration::from_millis(5);

/// Returns the file that describes the loop device of a volume to a test.
pub fn note(ctx: &Ctx, volume: &str) -> PathBuf {
    ctx.region.dir().join("attached").join(format!("{volume}.json"))
}

fn write_note(ctx: &Ctx, volume: &str, device: &Device, name: &str) -> anyhow::Result<()> {
    let path = note(ctx, volume);
    let beside = path.with_extension("new");
    std::fs::create_dir_all(path.parent().unwrap_or(&path))?;
    let note = serde_json::json!({"node": device.path, "rdev": device.rdev, "device": name});
    std::fs::write(&beside, note.to_string())?;
    Ok(std::fs::rename(&beside, &path)?)
}

/// Creates the volume's device on its instance.
async fn plug(ctx: &Rc<Ctx>, id: &str, attachment: &Attachment) -> anyhow::Result<()> {
    let builders = ctx.state().options.builders();
    let how =
        builders.into_iter().find(|b| b.id == attachment.instance).map_or(AttachAs::Nothing, |b| b.attach);
    let volume = VolumeId(id.to_owned());
    let held = match how {
        AttachAs::Nothing => return Ok(()),
        AttachAs::Loop => {
            let device = ctx.region.attach(&volume).await?;
            write_note(ctx, id, &device, &attachment.device).context("telling what is attached")?;
            Held::Loop(device)
        }
        AttachAs::Qmp(_) => {
            let guest =
                ctx.guests.get(&attachment.instance).cloned().context("an instance without a guest")?;
            let file = ctx.region.hold(&volume).await?;
            let serial = id.replace('-', "");
            let name = format!("{serial}-{}", attachment.number);
            let path = ctx.region.dir().join("volumes").join(format!("{id}.img"));
            guest.plug(&name, &serial, &path).await?;
            Held::Guest { guest, name, file }
        }
    };
    ctx.held.borrow_mut().insert(id.to_owned(), held);
    Ok(())
}

/// Returns whether the volume has this attachment, in this phase.
fn is(ctx: &Ctx, id: &str, number: u64, phase: Phase) -> bool {
    let state = ctx.state();
    let attachment = state.world.volumes.get(id).and_then(|v| v.attachment.as_ref());
    attachment.is_some_and(|a| a.number == number && a.phase == phase)
}

fn set(ctx: &Ctx, id: &str, number: u64, change: impl FnOnce(&mut Option<Attachment>)) {
    ctx.state().change(|world| {
        if let Some(volume) = world.volumes.get_mut(id)
            && volume.attachment.as_ref().is_some_and(|a| a.number == number)
        {
            change(&mut volume.attachment);
        }
    });
}

/// Executes an attachment: before the response if nothing is delayed, otherwise in the background.
pub async fn attach(ctx: &Rc<Ctx>, id: &str, attachment: Attachment) -> Result<()> {
    if attachment.turn == Some(Turn::Stuck) {
        return Ok(());
    }
    let (attaching, device) = {
        let mut state = ctx.state();
        let delays = state.options.delays;
        (
            Duration::from_millis(state.drawn(delays.attaching)),
            Duration::from_millis(state.drawn(delays.device)),
        )
    };
    let (ctx, id, number) = (ctx.clone(), id.to_owned(), attachment.number);
    let at_once = attaching.is_zero() && device.is_zero();
    let (at, volume) = (ctx.clone(), id.clone());
    let going_on = async move {
        let (ctx, id) = (at, volume);
        let plug = async || {
            if attachment.turn == Some(Turn::NoDevice) || !is_attached(&ctx, &id, number) {
                return Ok(());
            }
            plug(&ctx, &id, &attachment).await
        };
        let tell = || {
            if is(&ctx, &id, number, Phase::Attaching) {
                set(&ctx, &id, number, |a| {
                    if let Some(a) = a {
                        a.phase = Phase::Attached;
                    }
                });
            }
        };
        if device <= attaching {
            sleep(device).await;
            plug().await?;
            sleep(attaching - device).await;
            tell();
        } else {
            sleep(attaching).await;
            tell();
            sleep(device - attaching).await;
            plug().await?;
        }
        anyhow::Ok(())
    };
    if at_once {
        going_on.await.map_err(|error| {
            // The attachment is removed, so that a client that tries again gets the same error.
            set(&ctx, &id, number, |a| *a = None);
            internal(error)
        })
    } else {
        tokio::task::spawn_local(async move {
            if let Err(error) = going_on.await {
                internal(error);
            }
        });
        Ok(())
    }
}

fn is_attached(ctx: &Ctx, id: &str, number: u64) -> bool {
    is(ctx, id, number, Phase::Attaching) || is(ctx, id, number, Phase::Attached)
}

/// Returns text that distinguishes a loop device's binding from later bindings.
fn binding(rdev: u64) -> Option<(String, String)> {
    let dir = format!("/sys/dev/block/{}:{}", rustix::fs::major(rdev), rustix::fs::minor(rdev));
    let file = std::fs::read_to_string(format!("{dir}/loop/backing_file")).ok()?;
    Some((file, std::fs::read_to_string(format!("{dir}/diskseq")).unwrap_or_default()))
}

/// Releases the device of a volume, and waits until nobody has it open. With `force`, does not wait for clients.
async fn unplug(ctx: &Ctx, id: &str, force: bool) -> anyhow::Result<()> {
    _ = std::fs::remove_file(note(ctx, id));
    let held = ctx.held.borrow_mut().remove(id);
    match held {
        None => Ok(()),
        Some(Held::Loop(device)) => {
            let (rdev, bound) = (device.rdev, binding(device.rdev));
            drop(device);
            while !force && bound.is_some() && binding(rdev) == bound {
                sleep(LOOK).await;
            }
            Ok(())
        }
        Some(Held::Guest { guest, name, file }) => {
            let unplugged = guest.unplug(&name).await;
            drop(file);
            unplugged
        }
    }
}

/// Ends an attachment: before the response if possible, otherwise in the background.
pub async fn detach(ctx: &Rc<Ctx>, id: &str, attachment: Attachment, force: bool) {
    let number = attachment.number;
    let mark_busy = move |ctx: &Ctx, id: &str| {
        set(ctx, id, number, |a| {
            if let Some(a) = a {
                a.phase = Phase::Busy;
            }
        });
    };
    match attachment.turn {
        Some(Turn::Busy) if !force => return mark_busy(ctx, id),
        Some(Turn::Stuck) if !force => return,
        _ => {}
    }
    let delay = {
        let mut state = ctx.state();
        let detaching = state.options.delays.detaching;
        Duration::from_millis(state.drawn(detaching))
    };
    let (ctx, id) = (ctx.clone(), id.to_owned());
    let mut going_on = Box::pin(async move {
        sleep(delay).await;
        let mut letting_go = Box::pin(unplug(&ctx, &id, force));
        let done = tokio::select! {
            done = &mut letting_go => done,
            () = sleep(BUSY_AFTER) => {
                mark_busy(&ctx, &id);
                letting_go.await
            }
        };
        if let Err(error) = done {
            internal(error);
            return mark_busy(&ctx, &id);
        }
        ctx.state().change(|world| {
            if let Some(instance) = world.instances.get_mut(&attachment.instance) {
                instance.freed.insert(attachment.device.clone(), now());
            }
        });
        set(&ctx, &id, number, |a| *a = None);
    });
    // Most detachments take only a millisecond. The response waits for them, so that the next call sees the result.
    tokio::select! {
        () = &mut going_on => {}
        () = sleep(4 * LOOK) => drop(tokio::task::spawn_local(going_on)),
    }
}

/// Removes a disk from the guest without the API. The API still reports the volume as attached.
pub async fn pull(ctx: &Rc<Ctx>, id: &str) -> anyhow::Result<()> {
    unplug(ctx, id, true).await
}

/// Terminates an instance. Its attached volumes are deleted or become free.
pub async fn terminate(ctx: &Rc<Ctx>, instance: &str) -> Result<()> {
    let attached: Vec<(String, Attachment)> = {
        let mut state = ctx.state();
        state.change(|world| {
            if let Some(instance) = world.instances.get_mut(instance) {
                instance.state = "terminated".into();
            }
        });
        state.world.attached_to(instance).map(|(v, a)| (v.common.id.clone(), a.clone())).collect()
    };
    for (id, attachment) in attached {
        unplug(ctx, &id, true).await.map_err(internal)?;
        set(ctx, &id, attachment.number, |a| *a = None);
        if attachment.delete_on_termination {
            volumes_remove(ctx, &id).await?;
        }
    }
    Ok(())
}
