//! The inputs of an image: everything that can change its content. Computes their fingerprint, and explains the
//! differences between two images' inputs.

#[cfg(test)]
mod tests;

mod digest;
mod explain;
mod keys;

pub use explain::{PreviousInputs, explain};

use crate::cloud::Base;
use crate::config::project::Settings;
use crate::config::toml_reader;
use crate::definition;
use crate::definition::Definition;
use crate::error::Kind;
use crate::identity::checksum::{DefinitionTree, hex};
use crate::ids::{Architecture, ImageId, SnapshotId};
use anyhow::Result;
use keys::KeyDigests;
use serde::{Deserialize, Serialize};
use sha1::{Digest, Sha1};
use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// This number is raised if a change of oven or of a built-in plugin makes a different image from the same definition.
/// A new number causes a new bake of every image.
pub const FORMAT: u32 = 3;

/// The inputs of an image. Their JSON is canonical: its keys are sorted, and it has no spaces. The keys are sorted
/// because the fields are declared in alphabetical order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inputs {
    architecture: Architecture,
    base: InputBase,
    checksum: String,
    /// The files by path. A path is relative to the definition's directory, and is escaped by [`escape_path`].
    files: BTreeMap<String, InputFile>,
    format: u32,
    /// The definition's `name`, from which the image's name and tags are made. (Inputs that were stored by older
    /// versions of oven have none.)
    #[serde(default)]
    name: String,
    /// The variables' values, including those of the command line.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    vars: BTreeMap<String, String>,
    /// The key that [`Inputs::with_plugin`] added to `files`.
    #[serde(skip)]
    plugin: Option<String>,
    #[serde(skip)]
    warnings: Vec<String>,
    /// The digests of the keys of image.toml, if they are known.
    #[serde(skip)]
    keys: Option<KeyDigests>,
    #[serde(skip)]
    links: Vec<DefinitionLink>,
}

/// A symbolic link in a definition's directories.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DefinitionLink {
    /// The directory as the user spelt it, joined with the link's path below it.
    pub path: PathBuf,
    /// The target, as the link spells it.
    pub target: PathBuf,
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
    /// The target of a symbolic link, as the link spells it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    link: Option<String>,
    /// The digest of the file's content. `None` for a link to a directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sha1: Option<String>,
}

impl Inputs {
    /// Reads all files of the definition. Errors: [`Kind::Definition`], with the file that cannot be part of a
    /// definition.
    pub fn of(image: &Definition, base: &Base, settings: &Settings) -> Result<Self> {
        // No setting changes an image. The network's settings apply only to fetch steps, and the others define where
        // and how the image is baked. A setting that changes the image would have to be part of the fingerprint. So
        // this code does not compile until a new setting is listed here.
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
            limits: _,
        } = settings;
        let (tree, files) = read_files(image)?;
        Ok(Self {
            architecture: base.architecture,
            base: InputBase { id: base.id.clone(), snapshot: base.snapshot.clone() },
            checksum: tree.checksum(),
            files,
            format: FORMAT,
            name: image.name.clone(),
            vars: image.vars.values(),
            plugin: None,
            links: links_of(&tree),
            warnings: tree.warnings,
            keys: read_keys(image),
        })
    }

    /// Adds an external plugin that the definition names. `digest` is the digest of the plugin's file. [`explain()`]
    /// reports a change of the plugin like the change of a file.
    pub fn with_plugin(mut self, id: &str, digest: &str) -> Self {
        let file = InputFile { executable: false, link: None, sha1: Some(hex(&Sha1::digest(digest))) };
        let key = format!("the plugin {id}");
        self.files.insert(key.clone(), file);
        self.plugin = Some(key);
        self
    }

    /// Reads the definition again. Errors: [`Kind::Definition`] if the definition changed, because the image may
    /// contain parts of both versions.
    pub fn ensure_unchanged(&self, image: &Definition) -> Result<()> {
        let (tree, mut files) = read_files(image)?;
        files.extend(self.plugin.iter().filter_map(|key| Some((key.clone(), self.files.get(key)?.clone()))));
        let now = Self { checksum: tree.checksum(), files, keys: None, ..self.clone() };
        let mut differences = explain::compare(self, &now);
        // image.toml was parsed before the files were read. So the checksum may cover a newer version of image.toml
        // than the version that was baked. To find this, image.toml is parsed again and compared.
        if differences.is_empty() && image.reload()? != *image {
            differences.push(format!("{} changed", definition::FILE));
        }
        if differences.is_empty() {
            return Ok(());
        }
        let (dir, differences) = (image.dir.display(), differences.join(", "));
        Err(Kind::Definition
            .failure(format!("{dir} changed while it was baked: {differences}"))
            .hint("The image may have been made from either version. Bake again.")
            .into())
    }

    /// The architecture of the base.
    pub fn architecture(&self) -> Architecture {
        self.architecture
    }

    /// The value of the tag `ami_config_checksum`.
    pub fn checksum(&self) -> &str {
        &self.checksum
    }

    /// The value of the tag `oven:fingerprint`: 40 lower-case hexadecimal digits.
    pub fn fingerprint(&self) -> String {
        hex(&Sha1::digest(self.to_json()))
    }

    /// Canonical JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("texts, numbers and maps with texts as keys become JSON")
    }

    /// The digests of the keys of image.toml as JSON. [`PreviousInputs::with_keys`] reads them.
    pub fn keys_to_json(&self) -> Option<String> {
        self.keys.as_ref().and_then(|keys| serde_json::to_string(keys).ok())
    }

    /// A digest of the inputs that fits into a tag (at most 256 characters). [`explain()`] can compare other inputs
    /// with this digest.
    pub fn digest(&self) -> String {
        digest::write(self)
    }

    /// The symbolic links in the definition's directories.
    pub fn links(&self) -> &[DefinitionLink] {
        &self.links
    }

    /// Warnings about files in the definition's directories that the user may not have intended to include.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

fn read_keys(image: &Definition) -> Option<KeyDigests> {
    let text = toml_reader::read_text(&image.dir.join(definition::FILE), &image.project).ok()?;
    KeyDigests::of(&text)
}

/// Reads the symbolic links in a definition's directories. Errors: as [`Inputs::of`].
pub fn read_links(image: &Definition) -> Result<Vec<DefinitionLink>> {
    Ok(links_of(&read_files(image)?.0))
}

/// The links to directories, and then the links to files.
fn links_of(tree: &DefinitionTree) -> Vec<DefinitionLink> {
    let files = tree.files.iter().filter_map(|file| Some((&file.path, file.link.as_ref()?)));
    let links = tree.directory_links.iter().map(|(path, target)| (path, target)).chain(files);
    links.map(|(path, target)| DefinitionLink { path: path.clone(), target: target.clone() }).collect()
}

/// Reads a definition's files, and describes each.
fn read_files(image: &Definition) -> Result<(DefinitionTree, BTreeMap<String, InputFile>)> {
    let directories = image.directories();
    let tree = DefinitionTree::read_within(&directories, &|_| Some(image.project.clone()))?;
    let relative = |path: &Path| escape_path(path.strip_prefix(&directories[0]).unwrap_or(path));
    let links = tree.directory_links.iter().map(|(path, link)| {
        (relative(path), InputFile { executable: false, link: Some(escape_path(link)), sha1: None })
    });
    let files = tree.files.iter().map(|file| {
        let link = file.link.as_deref().map(escape_path);
        (relative(&file.path), InputFile { executable: file.executable, link, sha1: Some(file.sha1.clone()) })
    });
    let files = links.chain(files).collect();
    Ok((tree, files))
}

/// A path as text, without loss: bytes that are not UTF-8 become `\xNN`, and a backslash becomes two.
fn escape_path(path: &Path) -> String {
    let mut text = String::new();
    for chunk in path.as_os_str().as_bytes().utf8_chunks() {
        text.push_str(&chunk.valid().replace('\\', "\\\\"));
        chunk.invalid().iter().for_each(|byte| text.push_str(&format!("\\x{byte:02x}")));
    }
    text
}
