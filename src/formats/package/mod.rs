//! Reads the metadata of a package file: a `.deb` or an `.rpm`.
//!
//! The file may be malicious, so every read has a limit, and no file of the package is unpacked.

mod rpm;

use crate::error::Kind;
use crate::sys::signals::is_stop_requested;
use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};
use std::cell::Cell;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

/// The maximum size of the compressed control member in bytes. The largest one in Debian 12 is below 1 MiB.
const MAX_STORED: u64 = 16 << 20;
/// The maximum size of the decompressed control member in bytes. Its lists of checksums and its debconf texts may have
/// a few MiB.
const MAX_UNPACKED: u64 = 32 << 20;
/// The maximum size of the file `control` in bytes.
const MAX_CONTROL: u64 = 1 << 20;
/// The maximum memory of a decoder in bytes. xz needs 65 MiB for files of `xz -9`, and far less for dpkg's default.
const MAX_DECODER: u64 = 80 << 20;
/// The maximum size of zstd's window in bytes. `zstd -19` uses 8 MiB, and `--ultra` uses up to 128 MiB.
const MAX_WINDOW: u64 = 32 << 20;
/// The maximum number of members that are read from the ar file, and of entries that are read from the control archive.
const MAX_ENTRIES: usize = 4096;
const AR_MAGIC: &[u8] = b"!<arch>\n";
/// The size in bytes of the header before each member of an ar file.
const AR_HEADER: usize = 60;

/// The metadata of a package file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackageFile {
    pub name: String,
    pub version: String,
    /// The architecture in the package's spelling: `amd64`, `all`, `x86_64`, `noarch`.
    pub architecture: String,
    /// Lower-case hexadecimal.
    pub sha256: String,
}

/// Limits for several package files together.
pub struct PackageLimits {
    bytes: Sum,
    metadata: Sum,
}

/// A number of bytes that were read, and its limit.
struct Sum {
    used: Cell<u64>,
    limit: u64,
}

impl PackageLimits {
    /// `bytes` limits the sizes of the files, and `metadata` limits the unpacked metadata in them.
    pub fn new(bytes: u64, metadata: u64) -> Self {
        let sum = |limit| Sum { used: Cell::new(0), limit };
        Self { bytes: sum(bytes), metadata: sum(metadata) }
    }

    /// The limit that was exceeded, for an error.
    pub fn exceeded(&self) -> Option<String> {
        if self.bytes.is_exceeded() {
            Some(format!("{} GiB", self.bytes.limit >> 30))
        } else if self.metadata.is_exceeded() {
            Some(format!("{} MiB of unpacked metadata", self.metadata.limit >> 20))
        } else {
            None
        }
    }
}

impl Sum {
    fn is_exceeded(&self) -> bool {
        self.used.get() > self.limit
    }

    /// Counts bytes that were read, or that will be read. Fails if this exceeds the limit, or if a signal asked this
    /// process to end.
    fn add(&self, bytes: u64) -> Result<()> {
        if is_stop_requested() {
            return Err(Kind::Interrupted.error("interrupted"));
        }
        self.used.set(self.used.get().saturating_add(bytes));
        ensure!(!self.is_exceeded(), "it exceeds the limit of all package files together");
        Ok(())
    }
}

/// Counts everything that is read.
struct Counted<'l, R> {
    inner: R,
    sum: &'l Sum,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.sum.add(count as u64).map_err(std::io::Error::other)?;
        Ok(count)
    }
}

/// Reads a `.deb` or an `.rpm`. The error says what is wrong with the file, without its name.
pub fn read(path: &Path) -> Result<PackageFile> {
    read_from(File::open(path).context("opening it")?, &PackageLimits::new(u64::MAX, u64::MAX))
}

/// Like [`read`], but of an open file. Several files may share limits.
pub fn read_from(mut file: File, limits: &PackageLimits) -> Result<PackageFile> {
    let size = file.metadata().context("reading it")?.len();
    limits.bytes.add(size)?;
    let mut magic = [0u8; 16];
    let length = read_full(&mut file, &mut magic)?;
    let magic = &magic[..length];
    if magic.starts_with(rpm::MAGIC) {
        let rpm::Header { name, version, architecture } =
            rpm::read_header(&mut file, &limits.metadata).context("it is not a complete rpm package")?;
        let sha256 = sha256(file, size).context("reading it")?;
        return Ok(PackageFile { name, version, architecture, sha256 });
    }
    if magic.starts_with(b"version https://") {
        bail!("it is a Git LFS pointer instead of the package: run `git lfs pull`");
    }
    ensure!(magic.starts_with(AR_MAGIC), "it is neither a Debian nor an rpm package");
    let control = read_control(&mut file, &limits.metadata).context("it is not a complete Debian package")?;
    let sha256 = sha256(file, size).context("reading it")?;
    Ok(PackageFile {
        name: field(&control, "Package", is_valid_name)?,
        version: field(&control, "Version", is_valid_version)?,
        architecture: field(&control, "Architecture", is_valid_architecture)?,
        sha256,
    })
}

/// The digest of the whole file. Fails if the file grows beyond `size`, because only these bytes were counted.
fn sha256(mut file: File, size: u64) -> Result<String> {
    file.seek(SeekFrom::Start(0))?;
    let read = Sum { used: Cell::new(0), limit: size };
    let mut hasher = Sha256::new();
    let mut buffer = vec![0u8; 256 << 10];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            count => {
                read.add(count as u64).context("the file changed")?;
                hasher.update(&buffer[..count]);
            }
        }
    }
    Ok(hasher.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

/// Reads until the buffer is full or the file ends.
fn read_full(file: &mut impl Read, buffer: &mut [u8]) -> Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..])? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}

/// Reads the text of `control`. Also checks that every member ends inside the file, which detects a truncated package.
fn read_control(file: &mut File, metadata: &Sum) -> Result<String> {
    let end = file.metadata()?.len();
    let (mut control, mut has_data) = (None, false);
    let mut at = AR_MAGIC.len() as u64;
    for index in 0..MAX_ENTRIES {
        if at >= end {
            break;
        }
        file.seek(SeekFrom::Start(at))?;
        let mut header = [0u8; AR_HEADER];
        ensure!(read_full(file, &mut header)? == AR_HEADER, "it was cut short: an ar header is incomplete");
        ensure!(header.ends_with(b"`\n"), "an ar header is damaged");
        let text =
            |range: std::ops::Range<usize>| str::from_utf8(&header[range]).unwrap_or_default().trim_end();
        let name = text(0..16).trim_end_matches('/').to_owned();
        let size = text(48..58);
        let size: u64 =
            size.parse().ok().with_context(|| format!("the member {name} has an invalid size: {size:?}"))?;
        let start = at + AR_HEADER as u64;
        ensure!(start + size <= end, "it was cut short: the member {name} is incomplete");
        if index == 0 {
            ensure!(name == "debian-binary", "its first member is {name:?} instead of debian-binary");
            let mut version = String::new();
            file.take(size.min(16)).read_to_string(&mut version).context("reading debian-binary")?;
            ensure!(
                version.starts_with("2."),
                "its format is {:?}, but only 2.0 is supported",
                version.trim_end()
            );
        } else if name.starts_with("control.tar") && control.is_none() {
            ensure!(size <= MAX_STORED, "the member {name} is too large: {size} bytes");
            let text = decompress_control(&name, BufReader::new((&mut *file).take(size)), metadata);
            control = Some(text.with_context(|| format!("reading {name}"))?);
        } else if name.starts_with("data.tar") {
            has_data = true;
        }
        // Members begin at even offsets.
        at = start + size + size % 2;
    }
    ensure!(has_data, "the member data.tar is missing");
    control.context("the member control.tar is missing")
}

/// Decompresses the control archive, and finds `control` in it.
fn decompress_control(name: &str, stored: impl std::io::BufRead, metadata: &Sum) -> Result<String> {
    match name.strip_prefix("control.tar").unwrap_or_default() {
        "" => find_control(stored, metadata),
        ".gz" => find_control(flate2::bufread::MultiGzDecoder::new(stored), metadata),
        ".xz" => {
            let stream =
                liblzma::stream::Stream::new_stream_decoder(MAX_DECODER, liblzma::stream::CONCATENATED);
            find_control(liblzma::bufread::XzDecoder::new_stream(stored, stream?), metadata)
        }
        ".zst" => {
            let mut stored = stored;
            ensure_window(stored.fill_buf()?)?;
            find_control(ruzstd::decoding::StreamingDecoder::new(stored)?, metadata)
        }
        other => bail!("its compression {other:?} is not supported (supported are gz, xz and zst)"),
    }
}

/// Rejects a zstd frame whose header declares a window that would need too much memory (RFC 8878, 3.1.1.1).
pub(crate) fn ensure_window(frame: &[u8]) -> Result<()> {
    let descriptor = *frame.get(4).context("the zstd frame has no header")?;
    let window = if descriptor & 0x20 == 0 {
        let byte = u64::from(*frame.get(5).context("the zstd frame has no window")?);
        let base = 1u64 << (10 + (byte >> 3));
        base + base / 8 * (byte & 7)
    } else {
        // A frame with a single segment declares no window. Its window is as large as its content. The size of the
        // content follows the dictionary's id, and has 1, 2, 4 or 8 bytes.
        let dictionary = [0, 1, 2, 4][usize::from(descriptor & 3)];
        let length = 1usize << (descriptor >> 6);
        let bytes =
            frame.get(5 + dictionary..5 + dictionary + length).context("the zstd frame is too short")?;
        let size = bytes.iter().rev().fold(0u64, |sum, b| sum << 8 | u64::from(*b));
        if length == 2 { size + 256 } else { size }
    };
    ensure!(window <= MAX_WINDOW, "its zstd window of {window} bytes is too large");
    Ok(())
}

fn find_control(unpacked: impl Read, metadata: &Sum) -> Result<String> {
    let unpacked = Counted { inner: unpacked.take(MAX_UNPACKED), sum: metadata };
    let mut archive = tar::Archive::new(unpacked);
    for entry in archive.entries()?.take(MAX_ENTRIES) {
        let entry = entry.context("the archive is damaged")?;
        if matches!(&*entry.path_bytes(), b"./control" | b"control") && entry.header().entry_type().is_file()
        {
            ensure!(entry.size() <= MAX_CONTROL, "the file `control` is too large: {} bytes", entry.size());
            let mut text = String::new();
            entry.take(MAX_CONTROL).read_to_string(&mut text).context("reading the file `control`")?;
            return Ok(text);
        }
    }
    bail!("the file `control` is missing")
}

/// Reads a field of the first paragraph. The names of fields are case-insensitive. The fields that oven needs have a
/// single line.
fn field(control: &str, name: &str, is_valid: fn(&str) -> bool) -> Result<String> {
    let lines =
        control.lines().skip_while(|line| line.trim().is_empty()).take_while(|line| !line.trim().is_empty());
    let value = lines
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.eq_ignore_ascii_case(name))
        .map(|(_, value)| value.trim())
        .with_context(|| format!("its control file has no field {name}"))?;
    ensure!(is_valid(value), "its control file has an invalid {name}: {value:?}");
    Ok(value.to_owned())
}

// The values become arguments of commands and parts of messages, so only characters that Debian's policy allows are
// accepted.
fn is_valid_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.len() <= 128
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-._".contains(&b))
}
fn is_valid_version(version: &str) -> bool {
    version.starts_with(|c: char| c.is_ascii_alphanumeric())
        && version.len() <= 256
        && version.bytes().all(|b| b.is_ascii_alphanumeric() || b".+-~:".contains(&b))
}
fn is_valid_architecture(architecture: &str) -> bool {
    architecture.starts_with(|c: char| c.is_ascii_alphanumeric())
        && architecture.len() <= 64
        && architecture.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
}

#[cfg(test)]
pub(crate) mod fixture {
    //! Debian packages for tests.

    use std::io::Write;

    pub fn ar(members: &[(&str, &[u8])]) -> Vec<u8> {
        let mut file = super::AR_MAGIC.to_vec();
        for (name, content) in members {
            writeln!(file, "{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`", 0, 0, 0, "100644", content.len())
                .unwrap();
            file.extend_from_slice(content);
            file.resize(file.len().next_multiple_of(2), b'\n');
        }
        file
    }

    pub fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for (name, content) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, name, *content).unwrap();
        }
        tar.into_inner().unwrap()
    }

    pub fn pack(bytes: &[u8], compression: &str) -> Vec<u8> {
        match compression {
            ".gz" => {
                let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
                gz.write_all(bytes).unwrap();
                gz.finish().unwrap()
            }
            ".xz" => liblzma::encode_all(bytes, 6).unwrap(),
            ".zst" => ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest),
            _ => bytes.to_vec(),
        }
    }

    /// A package without files.
    pub fn deb(control: &str, compression: &str) -> Vec<u8> {
        let archive = pack(&tar(&[("./md5sums", b""), ("./control", control.as_bytes())]), compression);
        let name = format!("control.tar{compression}");
        ar(&[("debian-binary", b"2.0\n"), (&name, &archive), ("data.tar", &tar(&[]))])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTROL: &str = "Package: hello\nVersion: 2:2.10-3+b1~x\nArchitecture: amd64\nDescription: greets\n more\n\nPackage: other\n";

    fn open_bytes(bytes: &[u8]) -> Result<PackageFile, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        read(file.path()).map_err(|e| format!("{e:#}"))
    }

    #[test]
    fn every_compression_is_read() {
        for compression in ["", ".gz", ".xz", ".zst"] {
            let package = open_bytes(&fixture::deb(CONTROL, compression)).unwrap();
            let fields = (&*package.name, &*package.version, &*package.architecture);
            assert_eq!(fields, ("hello", "2:2.10-3+b1~x", "amd64"), "{compression}");
        }
    }

    #[test]
    fn the_digest_is_of_the_whole_file() {
        let bytes = fixture::deb(CONTROL, ".gz");
        let expected: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(open_bytes(&bytes).unwrap().sha256, expected);
    }

    #[test]
    fn invalid_packages_are_refused_with_a_reason() {
        let whole = fixture::deb(CONTROL, ".gz");
        let member =
            |name: &str, content: &[u8]| fixture::ar(&[("debian-binary", b"2.0\n"), (name, content)]);
        let control = |text: &str| fixture::deb(text, "");
        let mut huge = member("control.tar", b"");
        huge[8 + 60 + 4 + 48..8 + 60 + 4 + 58].copy_from_slice(b"9999999999");
        let cases: &[(&[u8], &str)] = &[
            (b"", "it is neither a Debian nor an rpm package"),
            (b"\x7fELF", "it is neither a Debian nor an rpm package"),
            (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
            (b"\xed\xab\xee\xdb\x03\x00", "not a complete rpm package: it was cut short"),
            (AR_MAGIC, "data.tar is missing"),
            (&whole[..whole.len() - 1], "the member data.tar is incomplete"),
            (&whole[..100], "is incomplete"),
            (&huge, "the member control.tar is incomplete"),
            (&fixture::ar(&[("x", b"")]), "its first member is \"x\""),
            (&fixture::ar(&[("debian-binary", b"3.0\n")]), "its format is \"3.0\""),
            (&member("control.tar.br", b""), "its compression \".br\" is not supported"),
            (&member("control.tar.gz", b"no gzip"), "reading control.tar.gz"),
            (&member("control.tar.xz", b"no xz"), "reading control.tar.xz"),
            (&member("control.tar.zst", b"no zstd"), "reading control.tar.zst"),
            (&member("control.tar", &fixture::tar(&[("./x", b"")])), "the file `control` is missing"),
            (&control("Package: a\nVersion: 1\n"), "its control file has no field Architecture"),
            (&control("Package: -y\nVersion: 1\nArchitecture: all\n"), "has an invalid Package: \"-y\""),
            (&control("Package: a\nVersion: $(x)\nArchitecture: all\n"), "has an invalid Version: \"$(x)\""),
        ];
        for (bytes, expected) in cases {
            let error = open_bytes(bytes).unwrap_err();
            assert!(error.contains(expected), "{expected:?} is not in {error:?}");
        }
    }

    #[test]
    fn decompression_bombs_end_at_the_limits() {
        let zeros = vec![0u8; 40 << 20];
        for compression in [".gz", ".xz"] {
            let tar = fixture::tar(&[("./filler", &zeros), ("./control", CONTROL.as_bytes())]);
            let name = format!("control.tar{compression}");
            let bomb = fixture::pack(&tar, compression);
            let error = open_bytes(&fixture::ar(&[("debian-binary", b"2.0\n"), (&name, &bomb)])).unwrap_err();
            assert!(error.contains(&format!("reading {name}")), "{error}");
        }
        // The header declares a window of 64 MiB. The frame is rejected before the window is allocated.
        let frame = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 16 << 3, 0, 0, 0];
        let error = open_bytes(&fixture::ar(&[("debian-binary", b"2.0\n"), ("control.tar.zst", &frame)]))
            .unwrap_err();
        assert!(error.contains("its zstd window of 67108864 bytes is too large"), "{error}");
        let long = format!("{CONTROL}X: {}\n", "x".repeat(2 << 20));
        assert!(
            open_bytes(&fixture::deb(&long, ".gz")).unwrap_err().contains("the file `control` is too large")
        );
    }

    #[test]
    fn damaged_packages_cause_no_panic() {
        let mut state = 1u32;
        for compression in ["", ".gz", ".xz", ".zst"] {
            let good = fixture::deb(CONTROL, compression);
            for _ in 0..300 {
                let mut bytes = good.clone();
                for _ in 0..3 {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let at = (state >> 8) as usize % bytes.len();
                    bytes[at] ^= (state as u8) | 1;
                }
                _ = open_bytes(&bytes);
            }
        }
    }
}
