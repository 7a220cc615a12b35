//! Imports a raw disk image as a base image of the region.

use super::records::{
    FileStamp, ImageRecord, ImportSource, LockedRegion, SnapshotRecord, created_after, sync_dir,
};
use super::{Region, Registered, register};
use crate::cloud::ec2_rules::{check_image_name, check_tags, ec2_error, new_id};
use crate::cloud::{DiskCopier, Image, ImageState, ROOT_DEVICE, Tags};
use crate::error::Kind;
use crate::ids::{Architecture, ImageId, SnapshotId};
use crate::report::Report;
use crate::sys::sparse_copy::{self, disk_name};
use crate::sys::tasks;
use anyhow::{Context, Result};
use async_trait::async_trait;
use std::fs::File;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

const GIB: u64 = 1 << 30;
/// An upper limit for the resolution of file times, in nanoseconds. Two changes of a file within this time can give it
/// the same times.
const TIME_RESOLUTION: i128 = 100_000_000;

impl Region {
    /// Opens a raw disk. If the file has another format, the error names the format.
    pub fn open_raw(raw: &Path) -> Result<File> {
        open(raw)
    }

    /// Imports a raw disk, which is a file or a block device, as an image. If an image of the same disk has the name,
    /// returns that image. Fails if an image of another disk has the name, as EC2 does.
    pub async fn import(
        &self,
        raw: &Path,
        name: &str,
        architecture: Architecture,
        tags: &Tags,
        report: &Report,
    ) -> Result<Image> {
        check_image_name(name)?;
        check_tags(tags)?;
        let file = open(raw)?;
        let context = || format!("importing {}", disk_name(raw));
        let before = stamp_of(&file)?;
        let settled = is_settled(&before) && file.metadata()?.is_file();
        let stamp = settled.then(|| before.clone());
        let holder = self.store().list::<ImageRecord>()?.into_iter().find(|image| image.name == name);
        let known = holder
            .as_ref()
            .and_then(|image| image.source.as_ref())
            .filter(|s| s.stamp.is_some() && s.stamp == stamp);
        let known = known.map(|source| source.digest.clone());
        let reader = file.try_clone()?;
        let digest = async {
            match known {
                Some(digest) => Ok(digest),
                None => {
                    tasks::run(move |stop| sparse_copy::digest(&reader, stop)).await.with_context(context)
                }
            }
        };
        if let Some(holder) = holder {
            let source = ImportSource { digest: digest.await?, stamp };
            let image = self.reuse_if_same(holder, &source, name, architecture).await?;
            if tags.iter().any(|(key, value)| image.tags.get(key) != Some(value)) {
                report.note(format!("{} exists already, and its tags are not changed", image.id));
            }
            return Ok(image);
        }
        let length = sparse_copy::length(&file)?;
        let size_gib = length.div_ceil(GIB);
        let dir = self.store().dir_of::<SnapshotRecord>();
        let reader = file.try_clone()?;
        let data = tasks::run(move |stop| {
            let data = sparse_copy::copy(&reader, size_gib * GIB, &dir, stop)?;
            data.file().sync_data().context("writing the snapshot to the disk")?;
            Ok(data)
        });
        // The digest and the copy are made concurrently, because the processor limits the one and the disk limits the
        // other.
        let (digest, data) = tokio::try_join!(digest, async { data.await.with_context(context) })?;
        let source = ImportSource { digest, stamp };
        let after = stamp_of(&file)?;
        if (after.modified, after.length) != (before.modified, before.length) {
            let failure = Kind::Usage.failure(format!("{} was changed while it was read", disk_name(raw)));
            return Err(failure.hint("Try again when no program writes to it.").into());
        }
        let snapshot = SnapshotRecord {
            id: SnapshotId(new_id("snap")),
            size_gib,
            volume: None,
            created: created_after::<SnapshotRecord>(&[]),
            description: String::new(),
            tags: tags.clone(),
            ready_at: 0,
            written: None,
        };
        let image = ImageRecord {
            id: ImageId(new_id("ami")),
            name: name.to_owned(),
            architecture,
            snapshot: snapshot.id.clone(),
            size_gib,
            root_device: ROOT_DEVICE.to_owned(),
            created: String::new(),
            description: String::new(),
            tags: tags.clone(),
            ready_at: self.ready_at(),
            failed: None,
            source: Some(source.clone()),
        };
        // Snapshot and image are created together, so that a failure leaves nothing to clean up.
        let import = move |region: &LockedRegion| {
            data.link(&region.data::<SnapshotRecord>(&snapshot.id.0))?;
            sync_dir(&region.dir_of::<SnapshotRecord>())?;
            region.write(&snapshot, true)?;
            let registered = register(region, image, &Default::default());
            if !matches!(registered, Ok(Registered::New(_))) {
                region.remove::<SnapshotRecord>(&snapshot.id.0)?;
            }
            registered
        };
        let image = match self.store().locked(import).await.with_context(context)? {
            Registered::New(id) => self.settled(&id).await?.map(|image| self.describe(image)),
            // Another process has registered the name in the meantime.
            Registered::Taken(holder) => {
                Some(self.reuse_if_same(*holder, &source, name, architecture).await?)
            }
        };
        let image =
            image.ok_or_else(|| Kind::Cloud.error(format!("{name} was deregistered by another process")))?;
        Ok(image)
    }

    /// Returns `holder`, the image that has the name, if it was imported from the same disk. Fails otherwise.
    async fn reuse_if_same(
        &self,
        holder: ImageRecord,
        source: &ImportSource,
        name: &str,
        architecture: Architecture,
    ) -> Result<Image> {
        let id = holder.id.clone();
        let duplicate = || {
            ec2_error("InvalidAMIName.Duplicate", format!("AMI name {name} is already in use by AMI {id}"))
        };
        if holder.source.as_ref().is_none_or(|theirs| theirs.digest != source.digest)
            || holder.architecture != architecture
        {
            return Err(duplicate());
        }
        let Some(holder) = self.settled(&id).await? else { return Err(duplicate()) };
        if self.store().state(&holder) != ImageState::Available {
            return Err(duplicate().context(format!("{id} has failed")));
        }
        // The content is the same, but it comes from another file, or the file's times changed. This file's stamp is
        // stored, so that the next import need not read the file.
        if source.stamp.is_some() && holder.source.as_ref() != Some(source) {
            let record = ImageRecord { source: Some(source.clone()), ..holder.clone() };
            let update = move |region: &LockedRegion| {
                // The image may have been deregistered in the meantime.
                if region.find::<ImageRecord>(&record.id.0)?.is_some() {
                    region.write(&record, false)
                } else {
                    Ok(())
                }
            };
            self.store().locked(update).await?;
        }
        Ok(self.describe(holder))
    }
}

#[async_trait(?Send)]
impl DiskCopier for Region {
    async fn copy_disk(
        &self,
        raw: &Path,
        name: &str,
        architecture: Architecture,
        report: &Report,
    ) -> Result<Image> {
        self.import(raw, name, architecture, &Tags::new(), report).await
    }
}

fn open(raw: &Path) -> Result<File> {
    let (name, is_standard_input) = (disk_name(raw), raw.starts_with("/proc/self/fd"));
    let metadata = std::fs::metadata(raw).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => Kind::NotFound.error(format!("{name} does not exist")),
        _ => anyhow::Error::from(e).context(format!("inspecting {name}")),
    })?;
    // The type is checked before the file is opened, because opening a FIFO blocks.
    if !metadata.is_file() && !metadata.file_type().is_block_device() {
        return Err(Kind::Usage.error(format!("{name} is neither a file nor a block device")));
    }
    let file = File::open(raw).with_context(|| format!("opening {name}"))?;
    let length = sparse_copy::length(&file)?;
    if length == 0 {
        return Err(Kind::Usage.error(format!("{name} is empty")));
    }
    let short = length.min(512);
    let (mut head, mut tail) = (vec![0; short as usize], vec![0; short as usize]);
    file.read_exact_at(&mut head, 0).with_context(|| format!("reading {name}"))?;
    file.read_exact_at(&mut tail, length - short).with_context(|| format!("reading {name}"))?;
    let Some((format, command)) = other_format(&head, &tail) else { return Ok(file) };
    let command = if is_standard_input { command.to_owned() } else { command.replace("FILE", &name) };
    Err(Kind::Usage
        .failure(format!("{name} is not a raw disk: it is {format}"))
        .hint(format!("Convert it with `{command}`."))
        .into())
}

/// Recognizes a file that is not a raw disk by its first and last bytes. Returns its format, and the command to convert
/// it.
fn other_format(head: &[u8], tail: &[u8]) -> Option<(&'static str, &'static str)> {
    let convert = "qemu-img convert -O raw FILE disk.raw";
    let at = |offset: usize, magic: &[u8]| head.get(offset..).is_some_and(|rest| rest.starts_with(magic));
    [
        (at(0, b"QFI\xfb"), "a qcow2 image", convert),
        (at(0, b"KDMV") || at(0, b"# Disk DescriptorFile"), "a VMDK image", convert),
        (at(0, b"vhdxfile"), "a VHDX image", convert),
        (at(0, b"conectix") || tail.starts_with(b"conectix"), "a VHD image", convert),
        (at(64, b"\x7f\x10\xda\xbe"), "a VDI image", convert),
        (at(0, b"\xfd7zXZ\0"), "compressed with xz", "xz -dc FILE > disk.raw"),
        (at(0, b"\x1f\x8b"), "compressed with gzip", "gzip -dc FILE > disk.raw"),
        (at(0, b"\x28\xb5\x2f\xfd"), "compressed with zstd", "zstd -dc FILE > disk.raw"),
        (at(0, b"BZh"), "compressed with bzip2", "bzip2 -dc FILE > disk.raw"),
        (at(0, b"PK\x03\x04"), "a zip archive", "unzip FILE"),
        (at(257, b"ustar"), "a tar archive", "tar -xf FILE"),
    ]
    .into_iter()
    .find_map(|(is, format, command)| is.then_some((format, command)))
}

fn stamp_of(file: &File) -> Result<FileStamp> {
    let metadata = file.metadata()?;
    let nanos = |seconds: i64, nanos: i64| i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
    Ok(FileStamp {
        device: metadata.dev(),
        inode: metadata.ino(),
        length: metadata.len(),
        modified: nanos(metadata.mtime(), metadata.mtime_nsec()),
        changed: nanos(metadata.ctime(), metadata.ctime_nsec()),
    })
}

/// Returns whether the file's times will show every later change. Returns false if the file was changed within the last
/// [`TIME_RESOLUTION`], because another change now could leave the times unchanged.
fn is_settled(stamp: &FileStamp) -> bool {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as i128);
    now - stamp.changed > TIME_RESOLUTION
}
