//! Everything that can change what an image holds: the fingerprint over it, and what differs between two.

#[cfg(test)]
mod tests;

mod digest;
mod explain;

pub use explain::{OldInputs, explain};

use crate::cloud::Base;
use crate::config::project::Settings;
use crate::definition;
use crate::definition::Definition;
use crate::error::Kind;
use crate::identity::checksum::{Tree, hex};
use crate::ids::{Architecture, ImageId, SnapshotId};
use anyhow::Result;
use serde::{Deserialize, Serialize};
use sha1::{Digest, Sha1};
use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Raised when a change of oven or of a built-in plugin makes a different image of the same definition: every image
/// is then baked anew, once.
pub const FORMAT: u32 = 2;

/// What goes into an image. Its JSON is canonical: keys sorted (the fields stand in that order), no spaces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inputs {
    architecture: Architecture,
    base: InputBase,
    checksum: String,
    /// By path relative to the definition's directory, escaped as [`spelt`] says.
    files: BTreeMap<String, InputFile>,
    format: u32,
    /// The family: an image's name and tags come of it. (Inputs that were kept before it counted have none.)
    #[serde(default)]
    name: String,
    /// The variables' values, those of the command line among them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    vars: BTreeMap<String, String>,
    /// What [`Inputs::with_plugin`] added to the files.
    #[serde(skip)]
    plugin: Option<String>,
    #[serde(skip)]
    warnings: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct InputBase {
    id: ImageId,
    snapshot: SnapshotId,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct InputFile {
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    executable: bool,
    /// What a symbolic link says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    link: Option<String>,
    /// Of what it holds; none for a link to a directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sha1: Option<String>,
}

impl Inputs {
    /// Reads all files of the definition. A failure names the file that cannot count.
    pub fn of(image: &Definition, base: &Base, settings: &Settings) -> Result<Self> {
        // None of the settings reaches an image: the network's serve fetch steps alone, the others say where and
        // how it is baked. A new one that does would have to count, so this stops compiling when there is a new one.
        let Settings {
            file: _,
            cloud: _,
            region: _,
            region_dir: _,
            instance_id: _,
            zone: _,
            disks: _,
            cache_gib: _,
            network: _,
        } = settings;
        let (tree, files) = read(image)?;
        Ok(Self {
            architecture: base.architecture,
            base: InputBase { id: base.id.clone(), snapshot: base.snapshot.clone() },
            checksum: tree.checksum(),
            files,
            format: FORMAT,
            name: image.name.clone(),
            vars: image.vars.values(),
            plugin: None,
            warnings: tree.warnings,
        })
    }

    /// Counts an out-of-tree plugin that the definition names, by the digest of its file: it is told as a file is.
    pub fn with_plugin(mut self, id: &str, digest: &str) -> Self {
        let file = InputFile { executable: false, link: None, sha1: Some(hex(&Sha1::digest(digest))) };
        let key = format!("the plugin {id}");
        self.files.insert(key.clone(), file);
        self.plugin = Some(key);
        self
    }

    /// Reads the definition again, and fails if it is not what it was: the image may hold parts of either.
    pub fn ensure_unchanged(&self, image: &Definition) -> Result<()> {
        let (tree, mut files) = read(image)?;
        files.extend(self.plugin.iter().filter_map(|key| Some((key.clone(), self.files.get(key)?.clone()))));
        let now = Self { checksum: tree.checksum(), files, ..self.clone() };
        let mut differences = explain::full(self, &now);
        // It was read before the files were: what counts may be newer than what was baked.
        if differences.is_empty() && Definition::load_with(&image.dir, &image.vars.given)? != *image {
            differences.push(format!("{} changed", definition::FILE));
        }
        if differences.is_empty() {
            return Ok(());
        }
        let (dir, differences) = (image.dir.display(), differences.join(", "));
        Err(Kind::Definition
            .failure(format!("{dir} changed while it was baked: {differences}"))
            .hint("Which of both went into the image is not known: bake again.")
            .into())
    }

    /// The base's.
    pub fn architecture(&self) -> Architecture {
        self.architecture
    }

    /// `ami_config_checksum`.
    pub fn checksum(&self) -> &str {
        &self.checksum
    }

    /// `oven:fingerprint`: 40 hexadecimal digits in lower case.
    pub fn fingerprint(&self) -> String {
        hex(&Sha1::digest(self.to_json()))
    }

    /// Canonical JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("texts, numbers and maps with texts as keys become JSON")
    }

    /// A tag's worth (at most 256 characters) of the inputs, from which [`explain()`] still tells what differs.
    pub fn digest(&self) -> String {
        digest::write(self)
    }

    /// What the user may not have meant in the definition's directories.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

/// A definition's files, and what is told of each.
fn read(image: &Definition) -> Result<(Tree, BTreeMap<String, InputFile>)> {
    let directories = image.directories();
    let tree = Tree::read(&directories)?;
    let relative = |path: &Path| spelt(path.strip_prefix(&directories[0]).unwrap_or(path));
    let links = tree.directory_links.iter().map(|(path, link)| {
        (relative(path), InputFile { executable: false, link: Some(spelt(link)), sha1: None })
    });
    let files = tree.files.iter().map(|file| {
        let link = file.link.as_deref().map(spelt);
        (relative(&file.path), InputFile { executable: file.executable, link, sha1: Some(file.sha1.clone()) })
    });
    let files = links.chain(files).collect();
    Ok((tree, files))
}

/// A path as text, without loss: bytes that are not UTF-8 become `\xNN`, and a backslash two.
fn spelt(path: &Path) -> String {
    let mut text = String::new();
    for chunk in path.as_os_str().as_bytes().utf8_chunks() {
        text.push_str(&chunk.valid().replace('\\', "\\\\"));
        chunk.invalid().iter().for_each(|byte| text.push_str(&format!("\\x{byte:02x}")));
    }
    text
}
