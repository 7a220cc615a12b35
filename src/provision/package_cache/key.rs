//! What tells one image's caches from another's.

use crate::definition::Ask;
use crate::identity::checksum::hex;
use crate::image::tree::Inside;
use crate::image::walk::Go;
use crate::provision::context::Work;
use anyhow::Result;
use oven_distro::{Cache, Expect, Phase, Plan, Shim, Step};
use rustix::fs::FileType;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::Path;

/// Raised when the key or what is kept under it comes to mean something else.
const FORMAT: &str = "1";
/// Digits of a key's name: no two are alike.
const DIGITS: usize = 40;

/// What a path of the sources is.
type Things = BTreeMap<String, String>;

/// The key: letters and digits. Of the sources it holds what steps see: the image's files, with the plan's over them,
/// whether these are placed already or not.
pub fn of(
    base: &str,
    caches: &[Cache],
    plan: &Plan,
    certificates: Option<&Shim>,
    inside: &Inside,
) -> Result<String> {
    let mut things = Things::new();
    for source in caches.iter().flat_map(|cache| &cache.sources) {
        look(source, inside, &mut things)?;
    }
    let sources = || caches.iter().flat_map(|cache| &cache.sources);
    let counts = |shim: &&Shim| sources().any(|source| Path::new(&shim.path).starts_with(source));
    for shim in plan.files.iter().chain(&plan.shims).filter(counts).chain(certificates) {
        things.insert(shim.path.clone(), digest(shim.content.as_bytes()));
    }
    let places: Vec<_> = caches.iter().map(|cache| (&cache.path, cache.holds)).collect();
    let text = serde_json::to_string(&(FORMAT, base, std::env::consts::ARCH, places, things))?;
    Ok(digest(text.as_bytes())[..DIGITS].to_owned())
}

/// What tells a step from all others that may find the same caches: itself, what is there for it, what was done to the
/// image before, and which package files there are. Not what comes after it: a bake of other packages finds done what no
/// package is named in.
pub fn of_step(work: &Work<'_>, step: &Step) -> Result<String> {
    let digest_of = |ask: &Ask| match ask {
        Ask::File { package, .. } => Some(package.sha256.clone()),
        Ask::Url { sha256, .. } => Some(sha256.clone()),
        Ask::Named { .. } | Ask::Group { .. } => None,
    };
    let files: Vec<_> = work.image.packages.iter().filter_map(digest_of).collect();
    let mut plan = work.plan.clone();
    plan.steps.retain(|step| step.phase == Phase::Prepare);
    plan.expect = Expect::default();
    let text = serde_json::to_string(&(FORMAT, plan, step, files))?;
    Ok(digest(text.as_bytes())[..DIGITS].to_owned())
}

/// A path of the image, and all below it. A symlink counts with what it says and, if it leads to a file, with what that
/// holds.
fn look(path: &str, inside: &Inside, things: &mut Things) -> Result<()> {
    if inside.directory(path)?.is_none() {
        if let Some(content) = file(path, inside)? {
            things.insert(path.to_owned(), content);
        }
        return Ok(());
    }
    let mut found = Vec::new();
    inside.walk(path, &mut |path, stat| {
        found.push((path.to_owned(), FileType::from_raw_mode(stat.st_mode)));
        Ok(Go::On)
    })?;
    for (path, kind) in found {
        let what = match kind {
            FileType::RegularFile => file(&path, inside)?,
            FileType::Symlink => {
                let target = inside.read_link(&path)?.unwrap_or_default();
                let content = if inside.directory(&path)?.is_none() { file(&path, inside)? } else { None };
                Some(format!("{} {}", target.display(), content.unwrap_or_default()))
            }
            _ => None,
        };
        if let Some(what) = what {
            things.insert(path, what);
        }
    }
    Ok(())
}

fn file(path: &str, inside: &Inside) -> Result<Option<String>> {
    Ok(inside.read(path)?.map(|content| digest(&content)))
}

fn digest(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}
