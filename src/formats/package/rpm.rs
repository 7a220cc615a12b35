//! Reads the header of an rpm file, without rpm.
//!
//! An rpm file has a lead of 96 bytes, a header with signatures, the package's own header, and the payload. Each header
//! has an index of tags and a store with the tags' values. Numbers are big-endian (see rpm's own "RPM V4 Package
//! format").

use super::{Sum, is_valid_architecture, is_valid_name, read_full};
use anyhow::{Context, Result, bail, ensure};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

/// The first bytes of every rpm file.
pub const MAGIC: &[u8] = b"\xed\xab\xee\xdb";
const LEAD: usize = 96;
/// The position of the type in the lead. The type is 0 for a binary package and 1 for a source package.
const TYPE: std::ops::Range<usize> = 6..8;
const HEADER_MAGIC: &[u8] = b"\x8e\xad\xe8\x01";
const ENTRY: usize = 16;
/// The maximum number of tags in a header, and the maximum size of its store in bytes. rpm's own limits are 65,535 tags
/// and 256 MiB. The header of a package with kernel firmware has about 2 MiB.
const MAX_ENTRIES: u32 = 0xffff;
const MAX_STORE: u32 = 64 << 20;

/// Types of values.
const INT32: u32 = 4;
const STRING: u32 = 6;

const NAME: u32 = 1000;
const VERSION: u32 = 1001;
const RELEASE: u32 = 1002;
const EPOCH: u32 = 1003;
const ARCH: u32 = 1022;
/// A tag of the header with signatures: the size of everything after that header.
const SIZE: u32 = 1000;

/// The fields of the header that oven uses.
pub struct Header {
    pub name: String,
    /// `EPOCH:VERSION-RELEASE`. The epoch is left out if it is missing or 0.
    pub version: String,
    pub architecture: String,
}

struct Tags {
    index: Vec<u8>,
    store: Vec<u8>,
}

/// Reads the headers from the start of the file. Also detects a truncated file.
pub fn read_header(file: &mut File, metadata: &Sum) -> Result<Header> {
    let end = file.metadata()?.len();
    file.seek(SeekFrom::Start(0))?;
    let mut lead = [0u8; LEAD];
    ensure!(read_full(file, &mut lead)? == LEAD, "it was cut short: its lead is incomplete");
    match lead[TYPE] {
        [0, 0] => {}
        [0, 1] => bail!("it is a source package: build it, and use the resulting package"),
        _ => bail!("its lead has an unknown package type"),
    }
    let signatures = read_tags(file, end, metadata).context("reading the header with signatures")?;
    // The header with signatures is padded to a multiple of 8 bytes.
    let at = file.stream_position()?.next_multiple_of(8);
    file.seek(SeekFrom::Start(at))?;
    if let Some(size) = signatures.number(SIZE)? {
        ensure!(
            at + u64::from(size) <= end,
            "it was cut short: {} bytes are missing",
            at + u64::from(size) - end
        );
    }
    let tags = read_tags(file, end, metadata).context("reading the header")?;
    let text = |tag: u32, what: &str, is_valid: fn(&str) -> bool| {
        let value = tags.text(tag)?.with_context(|| format!("its header has no {what}"))?;
        ensure!(is_valid(&value), "its header has an invalid {what}: {value:?}");
        Ok(value)
    };
    let (version, release) =
        (text(VERSION, "version", is_valid_part)?, text(RELEASE, "release", is_valid_part)?);
    let epoch = tags.number(EPOCH)?.filter(|epoch| *epoch > 0).map(|epoch| format!("{epoch}:"));
    Ok(Header {
        name: text(NAME, "name", is_valid_name)?,
        version: format!("{}{version}-{release}", epoch.unwrap_or_default()),
        architecture: text(ARCH, "architecture", is_valid_architecture)?,
    })
}

/// Returns whether this is a valid version or release. rpm allows no `-` in them.
fn is_valid_part(part: &str) -> bool {
    part.starts_with(|c: char| c.is_ascii_alphanumeric())
        && part.len() <= 128
        && part.bytes().all(|b| b.is_ascii_alphanumeric() || b".+~^_".contains(&b))
}

fn read_tags(file: &mut File, end: u64, metadata: &Sum) -> Result<Tags> {
    let mut intro = [0u8; 16];
    ensure!(read_full(file, &mut intro)? == intro.len(), "it was cut short");
    ensure!(intro.starts_with(HEADER_MAGIC), "it is damaged: a header has the wrong magic number");
    let (entries, size) = (number(&intro[8..12]), number(&intro[12..16]));
    ensure!(entries <= MAX_ENTRIES && size <= MAX_STORE, "it is too large: {entries} tags in {size} bytes");
    let index = entries as usize * ENTRY;
    let whole = index + size as usize;
    ensure!(file.stream_position()? + whole as u64 <= end, "it was cut short");
    metadata.add(whole as u64)?;
    let mut both = vec![0u8; whole];
    file.read_exact(&mut both)?;
    let store = both.split_off(index);
    Ok(Tags { index: both, store })
}

impl Tags {
    /// Returns the store's bytes from the beginning of a tag's value to the end of the store.
    fn value(&self, tag: u32, kind: u32) -> Result<Option<&[u8]>> {
        let Some(entry) = self.index.chunks_exact(ENTRY).find(|entry| number(&entry[..4]) == tag) else {
            return Ok(None);
        };
        ensure!(number(&entry[4..8]) == kind, "the tag {tag} has a value of another type");
        let value = self.store.get(number(&entry[8..12]) as usize..);
        Ok(Some(value.with_context(|| format!("the tag {tag} points outside the header"))?))
    }

    fn text(&self, tag: u32) -> Result<Option<String>> {
        let Some(value) = self.value(tag, STRING)? else { return Ok(None) };
        let text = value.split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(Some(String::from_utf8_lossy(text).into_owned()))
    }

    fn number(&self, tag: u32) -> Result<Option<u32>> {
        let Some(value) = self.value(tag, INT32)? else { return Ok(None) };
        let bytes = value.get(..4).with_context(|| format!("the tag {tag} points outside the header"))?;
        Ok(Some(number(bytes)))
    }
}

/// Reads a big-endian number of four bytes.
fn number(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |sum, byte| sum << 8 | u32::from(*byte))
}

#[cfg(test)]
pub(crate) mod fixture {
    //! rpm files for tests, with the parts that this module reads.

    use super::*;

    pub enum Value<'a> {
        Text(&'a str),
        Number(u32),
    }
    use Value::{Number, Text};

    pub fn header(tags: &[(u32, Value)]) -> Vec<u8> {
        let (mut index, mut store) = (Vec::new(), Vec::new());
        for (tag, value) in tags {
            let kind = if matches!(value, Text(_)) { STRING } else { INT32 };
            if kind == INT32 {
                store.resize(store.len().next_multiple_of(4), 0);
            }
            for number in [*tag, kind, store.len() as u32, 1] {
                index.extend(number.to_be_bytes());
            }
            match value {
                Text(text) => store.extend(text.bytes().chain([0])),
                Number(number) => store.extend(number.to_be_bytes()),
            }
        }
        let mut header = [HEADER_MAGIC, &[0; 4]].concat();
        header.extend((tags.len() as u32).to_be_bytes());
        header.extend((store.len() as u32).to_be_bytes());
        [header, index, store].concat()
    }

    pub fn rpm(tags: &[(u32, Value)]) -> Vec<u8> {
        let rest = [header(tags), b"payload".to_vec()].concat();
        let mut file = [MAGIC, &[3, 0, 0, 0]].concat();
        file.resize(LEAD, 0);
        file.extend(header(&[(SIZE, Number(rest.len() as u32)), (1, Text("x"))]));
        file.resize(file.len().next_multiple_of(8), 0);
        file.extend(rest);
        file
    }

    pub fn simple(name: &str, version: &str, release: &str, arch: &str) -> Vec<u8> {
        rpm(&[(NAME, Text(name)), (VERSION, Text(version)), (RELEASE, Text(release)), (ARCH, Text(arch))])
    }
}

#[cfg(test)]
mod tests {
    use super::fixture::{Value, rpm, simple};
    use super::*;

    fn header_of(bytes: &[u8]) -> Result<Header, String> {
        let path = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(path.path(), bytes).unwrap();
        let metadata = Sum { used: Default::default(), limit: u64::MAX };
        read_header(&mut File::open(path.path()).unwrap(), &metadata).map_err(|e| format!("{e:#}"))
    }

    #[test]
    fn name_version_and_architecture_are_read() {
        let header = header_of(&simple("site", "1.0~rc1", "2.el9_4", "noarch")).unwrap();
        assert_eq!(
            (&*header.name, &*header.version, &*header.architecture),
            ("site", "1.0~rc1-2.el9_4", "noarch")
        );
        for (epoch, version) in [(0, "9-1"), (32, "32:9-1")] {
            let text = Value::Text;
            let tags = [
                (NAME, text("bind")),
                (VERSION, text("9")),
                (RELEASE, text("1")),
                (ARCH, text("x86_64")),
                (EPOCH, Value::Number(epoch)),
            ];
            assert_eq!(header_of(&rpm(&tags)).unwrap().version, version);
        }
    }

    #[test]
    fn damaged_files_are_refused() {
        let whole = simple("site", "1", "1", "noarch");
        for end in 0..whole.len() {
            assert!(header_of(&whole[..end]).is_err(), "cut to {end} of {} bytes", whole.len());
        }
        // If any byte changes, nothing is read out of bounds, and no name becomes an option or a path.
        for at in 0..whole.len() {
            for byte in [0, 1, 0x7f, 0xff] {
                let mut bytes = whole.clone();
                bytes[at] = byte;
                if let Ok(header) = header_of(&bytes) {
                    assert!(is_valid_name(&header.name), "{:?}", header.name);
                }
            }
        }
        let mut source = whole.clone();
        source[7] = 1;
        assert!(header_of(&source).err().unwrap().contains("source package"));
        for (name, version) in
            [("-y", "1"), ("a b", "1"), ("a/b", "1"), ("a", "1-2"), ("a", "$(id)"), ("", "1")]
        {
            assert!(header_of(&simple(name, version, "1", "noarch")).is_err(), "{name} {version}");
        }
    }
}
