//! Lists the files in an initramfs. An initramfs is a sequence of cpio archives (format newc). Each archive is plain or
//! compressed. The initramfs is not trusted, and nothing is unpacked to disk.

pub mod lz4;

use anyhow::{Context, Error, Result, ensure};
use std::cell::{Cell, RefCell};
use std::io::{BufRead, BufReader, Read};
use std::ops::ControlFlow::{self, Break, Continue};

/// The maximum number of bytes, both packed and unpacked. All modules and firmware of a general-purpose kernel have
/// about 400 MiB.
const BYTES_MAX: u64 = 2 << 30;
/// The maximum number of archives. A usual initramfs has two to four.
const ARCHIVES_MAX: u32 = 1000;
/// The kernel's PATH_MAX.
const NAME_MAX: u64 = 4096;
const HEADER: usize = 110;
/// The maximum nesting. The kernel accepts a compressed archive, but no compressed archive inside of it.
const DEPTH_MAX: u32 = 1;
/// The memory in bytes that the xz decoder may use. The strongest preset of xz needs 65 MiB.
const MEMORY_MAX: u64 = 80 << 20;

/// Calls `see` with the name of each file, without a leading `/` or `./`, until `see` returns `Break`. `count` gets the
/// number of all bytes that are read and of all bytes that are unpacked. It is called for every few KiB. If it returns
/// an error, the listing ends with this error.
///
/// Errors: [`UnknownFormat`] if the compression is not supported. With any other error, the file is damaged or cannot
/// be read.
pub fn list_files(
    file: impl Read,
    count: &dyn Fn(u64) -> Result<()>,
    see: &mut dyn FnMut(&[u8]) -> ControlFlow<()>,
) -> Result<()> {
    let mut found = false;
    let mut see = |name: &[u8]| {
        found = true;
        see(name)
    };
    let counts = Counts { bytes: Cell::new(0), archives: Cell::new(0), error: RefCell::default(), count };
    let listed = list_archives(&mut Source::new(file, &counts), 0, &counts, &mut see);
    // The error passed through decoders, which may have replaced it by an error of their own.
    if let Some(error) = counts.error.take() {
        return Err(error);
    }
    _ = listed?;
    ensure!(found, "it contains no archive");
    Ok(())
}

/// Counts what is read from an initramfs.
struct Counts<'c> {
    bytes: Cell<u64>,
    archives: Cell<u32>,
    /// The error of a counter.
    error: RefCell<Option<Error>>,
    count: &'c dyn Fn(u64) -> Result<()>,
}

impl Counts<'_> {
    fn add_bytes(&self, bytes: u64) -> Result<()> {
        self.bytes.set(self.bytes.get() + bytes);
        ensure!(
            self.bytes.get() <= BYTES_MAX,
            "it has more than {} GiB when it is unpacked",
            BYTES_MAX >> 30
        );
        (self.count)(bytes)
    }

    fn add_archive(&self) -> Result<()> {
        self.archives.set(self.archives.get() + 1);
        ensure!(self.archives.get() <= ARCHIVES_MAX, "it has more than {ARCHIVES_MAX} archives");
        Ok(())
    }
}

/// Counts the bytes that are read.
struct CountedReader<'c, R> {
    inner: R,
    counts: &'c Counts<'c>,
}

impl<R: Read> Read for CountedReader<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.counts.add_bytes(read as u64).map_err(|error| {
            let text = format!("{error:#}");
            *self.counts.error.borrow_mut() = Some(error);
            std::io::Error::other(text)
        })?;
        Ok(read)
    }
}

/// A format that is not supported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownFormat(pub &'static str);
impl std::fmt::Display for UnknownFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, which oven cannot read", self.0)
    }
}
impl std::error::Error for UnknownFormat {}

/// A reader with lookahead. Counts all bytes.
struct Source<'c, R> {
    inner: BufReader<CountedReader<'c, R>>,
    /// The bytes that were peeked at, but not read yet.
    peeked: Vec<u8>,
}

impl<'c, R: Read> Source<'c, R> {
    fn new(inner: R, counts: &'c Counts<'c>) -> Self {
        let inner = CountedReader { inner, counts };
        Self { inner: BufReader::with_capacity(1 << 16, inner), peeked: Vec::new() }
    }

    /// Returns the next bytes, or fewer at the end.
    fn peek(&mut self, length: usize) -> Result<&[u8]> {
        if let Some(missing) = length.checked_sub(self.peeked.len()) {
            let mut next = (&mut self.inner).take(missing as u64);
            next.read_to_end(&mut self.peeked).context("reading it")?;
        }
        Ok(&self.peeked[..length.min(self.peeked.len())])
    }

    fn skip(&mut self, length: u64) -> Result<()> {
        let skipped = std::io::copy(&mut self.take(length), &mut std::io::sink()).context("reading it")?;
        ensure!(skipped == length, "it ends in the middle of a file");
        Ok(())
    }

    fn bytes(&mut self, length: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.read_exact(&mut bytes).context("it ends in the middle of a file")?;
        Ok(bytes)
    }
}
impl<R: Read> Read for Source<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let mut from = self.fill_buf()?;
        let read = from.read(buffer)?;
        self.consume(read);
        Ok(read)
    }
}
impl<R: Read> BufRead for Source<'_, R> {
    fn fill_buf(&mut self) -> std::io::Result<&[u8]> {
        if self.peeked.is_empty() { self.inner.fill_buf() } else { Ok(&self.peeked) }
    }

    fn consume(&mut self, amount: usize) {
        if self.peeked.is_empty() {
            self.inner.consume(amount);
        } else {
            self.peeked.drain(..amount);
        }
    }
}

fn list_archives(
    source: &mut Source<'_, impl Read>,
    depth: u32,
    counts: &Counts<'_>,
    see: &mut dyn FnMut(&[u8]) -> ControlFlow<()>,
) -> Result<ControlFlow<()>> {
    for number in 0.. {
        // There may be zeros between archives.
        loop {
            let zeros = source.fill_buf().context("reading it")?;
            let count = zeros.iter().take_while(|byte| **byte == 0).count();
            if zeros.is_empty() {
                return Ok(Continue(()));
            }
            source.consume(count);
            if count == 0 {
                break;
            }
        }
        counts.add_archive()?;
        let start = source.peek(6)?.to_vec();
        if start.starts_with(b"07070") {
            if list_archive(source, see)?.is_break() {
                return Ok(Break(()));
            }
            continue;
        }
        ensure!(depth < DEPTH_MAX, "the unpacked data is not an archive");
        match list_compressed(&start, source, counts, see) {
            // The remaining data is a signature or a configuration (bootconfig). The kernel uses the archives before
            // this data.
            Err(error) if number > 0 && error.is::<UnknownFormat>() => break,
            other => {
                if other?.is_break() {
                    return Ok(Break(()));
                }
            }
        }
    }
    Ok(Continue(()))
}

fn list_compressed<R: Read>(
    start: &[u8],
    source: &mut Source<'_, R>,
    counts: &Counts<'_>,
    see: &mut dyn FnMut(&[u8]) -> ControlFlow<()>,
) -> Result<ControlFlow<()>> {
    use liblzma::stream::Stream;
    let inner: Box<dyn Read + '_> = match start {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::GzDecoder::new(source)),
        [0xfd, b'7', b'z', b'X', b'Z', 0] => {
            let stream = Stream::new_stream_decoder(MEMORY_MAX, 0)?;
            Box::new(liblzma::bufread::XzDecoder::new_stream(source, stream))
        }
        [0x5d, 0, 0, ..] => {
            let stream = Stream::new_lzma_decoder(MEMORY_MAX)?;
            Box::new(liblzma::bufread::XzDecoder::new_stream(source, stream))
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let window = crate::formats::package::ensure_window(source.peek(18)?);
            window
                .map_err(|_| UnknownFormat("compressed by zstd with a window that takes too much memory"))?;
            Box::new(ruzstd::decoding::StreamingDecoder::new(source)?)
        }
        [0x02, 0x21, 0x4c, 0x18, ..] => Box::new(lz4::Lz4LegacyReader::new(source)),
        [b'B', b'Z', b'h', ..] => return Err(UnknownFormat("compressed by bzip2").into()),
        [0x89, b'L', b'Z', b'O', ..] => return Err(UnknownFormat("compressed by lzop").into()),
        _ => return Err(UnknownFormat("in an unknown format").into()),
    };
    list_archives(&mut Source::new(inner, counts), 1, counts, see)
}

/// Lists one archive, up to its trailer.
fn list_archive(
    source: &mut Source<'_, impl Read>,
    see: &mut dyn FnMut(&[u8]) -> ControlFlow<()>,
) -> Result<ControlFlow<()>> {
    loop {
        let header = source.bytes(HEADER)?;
        ensure!(matches!(&header[..6], b"070701" | b"070702"), "it is damaged: a header is missing");
        let number = |field: usize| -> Result<u64> {
            let digits = std::str::from_utf8(&header[6 + 8 * field..14 + 8 * field])?;
            u64::from_str_radix(digits, 16).context("it is damaged: a header has an invalid number")
        };
        let (size, length) = (number(6)?, number(11)?);
        ensure!((1..=NAME_MAX).contains(&length), "it is damaged: a file name has {length} bytes");
        let mut name = source.bytes(length as usize)?;
        name.pop();
        // The header (110 bytes) and the name together are padded to a multiple of four bytes. The content of each file
        // is padded in the same way.
        let padding = |length: u64| (4 - length % 4) % 4;
        let name_padding = padding(HEADER as u64 + length);
        source.skip(name_padding)?;
        if name == b"TRAILER!!!" {
            return Ok(Continue(()));
        }
        let bare = name.strip_prefix(b"./").unwrap_or(&name);
        if see(bare.strip_prefix(b"/").unwrap_or(bare)).is_break() {
            return Ok(Break(()));
        }
        source.skip(size)?;
        // The padding of the last file may be missing.
        let rest = source.peek(padding(size) as usize)?.len();
        source.skip(rest as u64)?;
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::io::Write;

    /// Returns an archive of these files, as `cpio -o -H newc` writes it.
    pub fn cpio(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut out = Vec::new();
        let pad = |out: &mut Vec<u8>| out.resize(out.len().next_multiple_of(4), 0);
        for (name, content) in files.iter().chain([&("TRAILER!!!", &[][..])]) {
            let mut fields = [0; 13];
            (fields[6], fields[11]) = (content.len(), name.len() + 1);
            write!(out, "070701").unwrap();
            fields.iter().for_each(|field| write!(out, "{field:08X}").unwrap());
            out.extend(name.bytes().chain([0]));
            pad(&mut out);
            out.extend(*content);
            pad(&mut out);
        }
        out.resize(out.len().next_multiple_of(512), 0);
        out
    }

    pub fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn listed(bytes: &[u8]) -> Result<Vec<String>> {
        let mut all = Vec::new();
        list_files(bytes, &|_| Ok(()), &mut |name| {
            all.push(String::from_utf8_lossy(name).into_owned());
            Continue(())
        })?;
        Ok(all)
    }

    fn modules() -> Vec<u8> {
        let module = vec![7; 5001];
        cpio(&[
            (".", b""),
            ("./lib/modules/6.1/kernel/nvme.ko", &module),
            ("/usr/lib/modules/6.1/kernel/ena.ko.xz", b"abc"),
        ])
    }

    const NAMES: [&str; 3] = [".", "lib/modules/6.1/kernel/nvme.ko", "usr/lib/modules/6.1/kernel/ena.ko.xz"];

    #[test]
    fn every_compression_behind_microcode_that_is_not_compressed() {
        let microcode = cpio(&[("kernel/x86/microcode/AuthenticAMD.bin", &[1; 3000])]);
        let xz = |check| {
            let stream = liblzma::stream::Stream::new_easy_encoder(6, check).unwrap();
            let mut encoder = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
            encoder.write_all(&modules()).unwrap();
            encoder.finish().unwrap()
        };
        let options = liblzma::stream::LzmaOptions::new_preset(6).unwrap();
        let stream = liblzma::stream::Stream::new_lzma_encoder(&options).unwrap();
        let mut lzma = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
        lzma.write_all(&modules()).unwrap();
        for (what, packed) in [
            ("as it is", modules()),
            ("gzip", gzip(&modules())),
            ("xz", xz(liblzma::stream::Check::Crc32)),
            ("lzma", lzma.finish().unwrap()),
            (
                "zstd",
                ruzstd::encoding::compress_to_vec(
                    &modules()[..],
                    ruzstd::encoding::CompressionLevel::Fastest,
                ),
            ),
            ("lz4", lz4::tests::legacy(&modules())),
        ] {
            assert_eq!(listed(&packed).expect(what), NAMES, "{what}");
            let mut names = vec!["kernel/x86/microcode/AuthenticAMD.bin".to_owned()];
            names.extend(NAMES.map(str::to_owned));
            assert_eq!(listed(&[&microcode[..], &packed].concat()).expect(what), names, "{what}");
            // Another archive follows. Boot loaders can append an archive in this way.
            names.push("late".to_owned());
            let late = cpio(&[("late", b"x")]);
            let three = [&microcode[..], &packed, &[0; 8], &late, b"#BOOTCONFIG\n"].concat();
            assert_eq!(listed(&three).expect(what), names, "{what}");
        }
    }

    #[test]
    fn listing_ends_when_the_callback_breaks() {
        let mut seen = 0;
        let broken = [&gzip(&modules())[..], b"garbage"].concat();
        list_files(&broken[..], &|_| Ok(()), &mut |_| {
            seen += 1;
            if seen == 2 { Break(()) } else { Continue(()) }
        })
        .unwrap();
        assert_eq!(seen, 2);
    }

    #[test]
    fn files_that_are_no_initramfs_are_errors() {
        for (bytes, why) in [
            (&b""[..], "no archive"),
            (&[0; 512], "no archive"),
            (b"BZh91AY", "bzip2"),
            (b"\x89LZO\0\r", "lzop"),
            (b"#!/bin/sh\n", "unknown format"),
            (&gzip(b"#!/bin/sh\n"), "not an archive"),
            (&gzip(&gzip(b"x")), "not an archive"),
            (&modules()[..3000], "ends in the middle"),
            (&modules()[..50], "ends in the middle"),
        ] {
            let error = format!("{:#}", listed(bytes).unwrap_err());
            assert!(error.contains(why), "{why}: {error}");
        }
        let mut long = modules();
        long[94..102].copy_from_slice(b"7FFFFFFF");
        assert!(listed(&long).unwrap_err().to_string().contains("a file name has"));
    }

    #[test]
    fn the_memory_of_the_decoder_is_limited() {
        // The headers of .lzma and of .xz declare the size of the dictionary, for which the decoder allocates memory.
        let lzma = |mib: u32| [&[0x5d][..], &(mib << 20).to_le_bytes(), &[0xff; 8], &[0; 64]].concat();
        let xz = |size: u8| {
            let mut packed = liblzma::encode_all(&modules()[..], 6).unwrap();
            // The header of the first block: its length, flags, a filter (LZMA2) with its only property, and a CRC.
            assert_eq!(packed[12..16], [2, 0, 0x21, 1]);
            packed[16] = size;
            let mut crc = flate2::Crc::new();
            crc.update(&packed[12..20]);
            packed[20..24].copy_from_slice(&crc.sum().to_le_bytes());
            packed
        };
        // 64 MiB, 96 MiB and 128 MiB.
        assert_eq!(listed(&xz(28)).unwrap(), NAMES);
        for (what, packed) in [("lzma", lzma(96)), ("lzma", lzma(128)), ("xz", xz(29)), ("xz", xz(30))] {
            let error = format!("{:#}", listed(&packed).unwrap_err());
            assert!(error.contains("memory"), "{what}: {error}");
        }
        let error = format!("{:#}", listed(&lzma(64)).unwrap_err());
        assert!(!error.contains("memory"), "{error}");
    }

    #[test]
    fn unpacked_bytes_are_counted() {
        let zeros = gzip(&cpio(&[("zeros", &vec![0; 64 << 20])]));
        let bytes = Cell::new(0);
        let count = |more| {
            bytes.set(bytes.get() + more);
            ensure!(bytes.get() < 16 << 20, "counted");
            Ok(())
        };
        let error = list_files(&zeros[..], &count, &mut |_| Continue(())).unwrap_err();
        assert_eq!(error.to_string(), "counted");
        assert!(zeros.len() < 8 << 20 && bytes.get() < 17 << 20, "{} {}", zeros.len(), bytes.get());
    }

    #[test]
    fn bytes_and_archives_of_one_initramfs_are_limited() {
        let mut header = cpio(&[("zeros", b"")])[..HEADER + 8].to_vec();
        header[54..62].copy_from_slice(b"FFFFFFFC");
        let endless = (&header[..]).chain(std::io::repeat(0));
        let error = list_files(endless, &|_| Ok(()), &mut |_| Continue(())).unwrap_err();
        assert!(format!("{error:#}").contains("more than 2 GiB"), "{error:#}");
        for member in [gzip(b""), cpio(&[])] {
            let many = member.repeat(ARCHIVES_MAX as usize + 1);
            let error = listed(&many).unwrap_err();
            assert!(format!("{error:#}").contains("more than 1000 archives"), "{error:#}");
        }
    }

    /// Damaged input leads to a result or an error, but never to a panic or an endless loop.
    #[test]
    fn damage_is_an_error_and_no_panic() {
        let good: [Vec<u8>; 4] = [
            modules(),
            gzip(&modules()),
            lz4::tests::legacy(&modules()),
            liblzma::encode_all(&modules()[..], 1).unwrap(),
        ];
        let mut random = crate::formats::partition::tests::Random(0x1217);
        for round in 0..2000 {
            let mut bytes = good[round % 4].clone();
            for _ in 0..1 + random.below(4) {
                let at = random.below(bytes.len());
                bytes[at] = random.next() as u8;
            }
            bytes.truncate(bytes.len() - [0, random.below(bytes.len())][random.below(2)]);
            _ = listed(&bytes);
        }
    }
}
