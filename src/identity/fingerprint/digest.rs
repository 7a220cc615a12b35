//! The digest of the inputs, for a tag: `v1;FORMAT;ARCHITECTURE;BASE;SNAPSHOT;DEPTH;ENTRIES`.
//!
//! Each file has an entry of 7 characters: 3 of its path's hash and 4 of its content's hash. If there are too many
//! files for a tag's 256 characters, all files of a directory share one entry. DEPTH says how many levels of
//! directories are distinguished. Variables also have entries.

use super::{InputFile, Inputs};
use sha1::{Digest, Sha1};
use std::collections::BTreeMap;

/// EC2's limit for a tag's value.
pub const MAX: usize = 256;
const PATH_CHARACTERS: usize = 3;
const CONTENT_CHARACTERS: usize = 4;
const ENTRY: usize = PATH_CHARACTERS + CONTENT_CHARACTERS;
const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// The name of an entry for variables begins with this prefix. No path in a definition begins with it.
pub const VARIABLES: &str = "/";

/// The groups of files that share an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Each file has its own entry.
    Files,
    /// Files share an entry if their paths begin with the same directories. The number says how many directories of
    /// each path are compared.
    Directories(usize),
    /// All files share one entry.
    Whole,
}

/// All depths, from fine to coarse.
const DEPTHS: [Depth; 5] =
    [Depth::Files, Depth::Directories(3), Depth::Directories(2), Depth::Directories(1), Depth::Whole];

/// A parsed digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParsedDigest {
    pub format: String,
    pub architecture: String,
    pub base: String,
    pub snapshot: String,
    pub depth: Depth,
    /// The hash of each group's content, by the hash of the group's name.
    pub entries: BTreeMap<String, String>,
}

impl Depth {
    fn letter(self) -> char {
        match self {
            Self::Files => 'f',
            Self::Directories(count) => char::from_digit(count as u32, 10).unwrap_or('w'),
            Self::Whole => 'w',
        }
    }

    /// The name of a variable's entry.
    fn variable_group(self, name: &str) -> String {
        match self {
            Self::Files => format!("{VARIABLES}the variable {name}"),
            Self::Directories(_) | Self::Whole => format!("{VARIABLES}variables"),
        }
    }

    /// The name of a file's entry: the path of the file, or of its directory with a `/` at the end.
    fn file_group(self, path: &str) -> String {
        let count = match self {
            Self::Files => return path.into(),
            Self::Directories(count) => count,
            Self::Whole => return String::new(),
        };
        // The `..`s at the beginning of an input's path do not count as directories.
        let up: usize = path.split('/').take_while(|part| *part == "..").count();
        let parts: Vec<&str> = path.split('/').collect();
        if parts.len() <= up + count { path.into() } else { format!("{}/", parts[..up + count].join("/")) }
    }
}

/// The entry of each group, by the group's name. An entry is the hash of the name and the hash of the content.
pub fn entries_by_group(inputs: &Inputs, depth: Depth) -> BTreeMap<String, (String, String)> {
    let mut groups: BTreeMap<String, Sha1> = BTreeMap::new();
    for (path, InputFile { executable, link, sha1 }) in &inputs.files {
        let hasher = groups.entry(depth.file_group(path)).or_default();
        // No field can contain a NUL, and all fields are always written. So different fields cannot give the same text.
        let (link, sha1) = (link.as_deref().unwrap_or_default(), sha1.as_deref().unwrap_or_default());
        hasher.update(format!("{path}\0{executable}\0{link}\0{sha1}\0"));
    }
    for (name, value) in &inputs.vars {
        let hasher = groups.entry(depth.variable_group(name)).or_default();
        hasher.update(format!("{name}\0{}\0{value}", value.len()));
    }
    let entry = |(name, hasher): (String, Sha1)| {
        let path = encode_hash(&Sha1::digest(&name), PATH_CHARACTERS);
        (name, (path, encode_hash(&hasher.finalize(), CONTENT_CHARACTERS)))
    };
    groups.into_iter().map(entry).collect()
}

fn encode_hash(hash: &[u8], characters: usize) -> String {
    let bits = hash.iter().take(8).fold(0u64, |bits, byte| bits << 8 | u64::from(*byte));
    (0..characters).map(|i| char::from(ALPHABET[(bits >> (58 - 6 * i)) as usize & 63])).collect()
}

pub fn write(inputs: &Inputs) -> String {
    let Inputs { architecture, base, format, files, vars, .. } = inputs;
    let fixed = format!("v1;{format};{architecture};{};{};", base.id, base.snapshot);
    let max_entries = MAX.saturating_sub(fixed.len() + 2) / ENTRY;
    for depth in DEPTHS {
        // If there are too many files and variables, they cannot each have an entry. Then this depth is skipped without
        // computing the groups, because the computation takes long for a huge definition.
        if depth == Depth::Files && files.len() + vars.len() > max_entries {
            continue;
        }
        let groups = entries_by_group(inputs, depth);
        if groups.len() <= max_entries {
            let entries: String = groups.values().flat_map(|(path, content)| [&**path, content]).collect();
            return format!("{fixed}{};{entries}", depth.letter());
        }
    }
    fixed
}

/// Parses a digest. `None` if this version of oven does not know its form.
pub fn parse(digest: &str) -> Option<ParsedDigest> {
    let fields: [&str; 7] = digest.split(';').collect::<Vec<_>>().try_into().ok()?;
    let [version, format, architecture, base, snapshot, letter, entries] = fields;
    let depth = DEPTHS.into_iter().find(|depth| depth.letter().to_string() == letter)?;
    let is_valid = entries.is_ascii() && entries.len().is_multiple_of(ENTRY);
    (version == "v1" && is_valid).then(|| ParsedDigest {
        format: format.into(),
        architecture: architecture.into(),
        base: base.into(),
        snapshot: snapshot.into(),
        depth,
        entries: (0..entries.len() / ENTRY)
            .map(|i| entries[i * ENTRY..(i + 1) * ENTRY].split_at(PATH_CHARACTERS))
            .map(|(path, content)| (path.into(), content.into()))
            .collect(),
    })
}
