//! The inputs in a tag: `v1;FORMAT;ARCHITECTURE;BASE;SNAPSHOT;DEPTH;ENTRIES`.
//!
//! An entry is 7 characters for each file: 3 of its path's hash and 4 of its content's. Where there are too many files
//! for a tag's 256 characters, those of a directory share an entry: DEPTH says how many directories are told apart.

use super::{InputFile, Inputs};
use sha1::{Digest, Sha1};
use std::collections::BTreeMap;

/// EC2's limit for a tag's value.
pub const MAX: usize = 256;
const PATH_CHARACTERS: usize = 3;
const CONTENT_CHARACTERS: usize = 4;
const ENTRY: usize = PATH_CHARACTERS + CONTENT_CHARACTERS;
const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// Before what is no file: a path in a definition does not begin like that.
pub const VARIABLES: &str = "/";

/// What shares an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Nothing: each file has its own.
    Files,
    /// Files whose first this many directories are the same.
    Directories(usize),
    /// All files.
    Whole,
}

/// From fine to coarse.
const DEPTHS: [Depth; 5] =
    [Depth::Files, Depth::Directories(3), Depth::Directories(2), Depth::Directories(1), Depth::Whole];

/// A digest that was read again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Read {
    pub format: String,
    pub architecture: String,
    pub base: String,
    pub snapshot: String,
    pub depth: Depth,
    /// Hash of the path (or of the directory's) and of the content.
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

    /// What a variable's entry is called.
    fn variables(self, name: &str) -> String {
        match self {
            Self::Files => format!("{VARIABLES}the variable {name}"),
            Self::Directories(_) | Self::Whole => format!("{VARIABLES}variables"),
        }
    }

    /// What a file's entry is called: the file, or `directory/`.
    fn group(self, path: &str) -> String {
        let count = match self {
            Self::Files => return path.into(),
            Self::Directories(count) => count,
            Self::Whole => return String::new(),
        };
        // The `..` of an input are no directories to tell apart.
        let up: usize = path.split('/').take_while(|part| *part == "..").count();
        let parts: Vec<&str> = path.split('/').collect();
        if parts.len() <= up + count { path.into() } else { format!("{}/", parts[..up + count].join("/")) }
    }
}

/// What is told of each group of files, by its name: hash of the name, hash of the content.
pub fn groups(inputs: &Inputs, depth: Depth) -> BTreeMap<String, (String, String)> {
    let mut groups: BTreeMap<String, Sha1> = BTreeMap::new();
    for (path, InputFile { executable, link, sha1 }) in &inputs.files {
        let hasher = groups.entry(depth.group(path)).or_default();
        // No field can hold a NUL, and none is left out: nothing can be moved from one to the next.
        let (link, sha1) = (link.as_deref().unwrap_or_default(), sha1.as_deref().unwrap_or_default());
        hasher.update(format!("{path}\0{executable}\0{link}\0{sha1}\0"));
    }
    for (name, value) in &inputs.vars {
        let hasher = groups.entry(depth.variables(name)).or_default();
        hasher.update(format!("{name}\0{}\0{value}", value.len()));
    }
    let told = |(name, hasher): (String, Sha1)| {
        let path = short(&Sha1::digest(&name), PATH_CHARACTERS);
        (name, (path, short(&hasher.finalize(), CONTENT_CHARACTERS)))
    };
    groups.into_iter().map(told).collect()
}

fn short(hash: &[u8], characters: usize) -> String {
    let bits = hash.iter().take(8).fold(0u64, |bits, byte| bits << 8 | u64::from(*byte));
    (0..characters).map(|i| char::from(ALPHABET[(bits >> (58 - 6 * i)) as usize & 63])).collect()
}

pub fn write(inputs: &Inputs) -> String {
    let Inputs { architecture, base, format, files, vars, .. } = inputs;
    let fixed = format!("v1;{format};{architecture};{};{};", base.id, base.snapshot);
    let room = MAX.saturating_sub(fixed.len() + 2) / ENTRY;
    for depth in DEPTHS {
        // Grouping a huge definition five times is for nothing when the files alone are too many.
        if depth == Depth::Files && files.len() + vars.len() > room {
            continue;
        }
        let groups = groups(inputs, depth);
        if groups.len() <= room {
            let entries: String = groups.values().flat_map(|(path, content)| [&**path, content]).collect();
            return format!("{fixed}{};{entries}", depth.letter());
        }
    }
    fixed
}

/// Reads a digest; `None` if it is none that this version knows.
pub fn read(digest: &str) -> Option<Read> {
    let fields: [&str; 7] = digest.split(';').collect::<Vec<_>>().try_into().ok()?;
    let [version, format, architecture, base, snapshot, letter, entries] = fields;
    let depth = DEPTHS.into_iter().find(|depth| depth.letter().to_string() == letter)?;
    let plain = entries.is_ascii() && entries.len().is_multiple_of(ENTRY);
    (version == "v1" && plain).then(|| Read {
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
