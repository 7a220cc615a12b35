//! Makes inputs: a seed with random changes.

use super::targets::Target;
use oven_testing::Dice;
use std::path::{Path, PathBuf};

/// Bytes that are limits of many formats.
const BYTES: [u8; 10] = [0, 1, 0x7f, 0x80, 0xff, b' ', b'\n', b'/', b'"', b'='];

/// A file with valid content.
pub struct Seed {
    pub path: PathBuf,
    pub bytes: Vec<u8>,
    /// The positions of bytes other than zero. Most bytes of a disk are zero and have no meaning.
    meaningful: Vec<usize>,
}

/// Reads the seeds of a target, in the order of their names.
pub fn seeds(target: &Target) -> Vec<Seed> {
    let mut paths = Vec::new();
    for (dir, ending) in target.seeds {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(dir);
        let files = dir.read_dir().unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
        paths.extend(
            files
                .map(|file| file.unwrap().path())
                .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().ends_with(ending))),
        );
    }
    paths.sort();
    let read = |path: PathBuf| {
        let bytes = std::fs::read(&path).unwrap();
        let meaningful = (0..bytes.len()).filter(|at| bytes[*at] != 0).collect();
        Seed { path, bytes, meaningful }
    };
    paths.into_iter().map(read).collect()
}

/// Returns an input. The first inputs are the seeds themselves.
pub fn input(target: &Target, seeds: &[Seed], run: u64, number: u64) -> Vec<u8> {
    if let Some(seed) = usize::try_from(number).ok().and_then(|number| seeds.get(number)) {
        return seed.bytes.clone();
    }
    // Both numbers are mixed, so that the inputs of two runs have nothing in common.
    let mut dice = Dice(run.wrapping_mul(0xd134_2543_de82_ef95) ^ number);
    let seed = dice.of(seeds);
    let mut input = seed.bytes.clone();
    let changes = [1, 1, 1, 2, 4, 10][dice.roll(6)];
    for _ in 0..changes {
        let at = position(&mut dice, seed, input.len());
        change(&mut dice, &mut input, at, target, seeds);
        input.truncate(target.longest);
    }
    input
}

fn position(dice: &mut Dice, seed: &Seed, length: usize) -> usize {
    if dice.roll(4) == 0 || seed.meaningful.is_empty() {
        return dice.roll(length + 1);
    }
    (dice.of(&seed.meaningful) + dice.roll(3)).min(length)
}

fn change(dice: &mut Dice, input: &mut Vec<u8>, at: usize, target: &Target, seeds: &[Seed]) {
    let end = (at + length(dice)).min(input.len());
    let byte = if dice.roll(2) == 0 { *dice.of(&BYTES) } else { dice.roll(256) as u8 };
    match dice.roll(13) {
        0 | 1 => overwrite(input, at, &[byte]),
        2 if at < input.len() => input[at] ^= 1 << dice.roll(8),
        2 | 3 => {
            let number = number(dice);
            overwrite(input, at, &number);
        }
        4 if at < input.len() => {
            let by = dice.roll(33) as u8;
            input[at] = input[at].wrapping_add(by).wrapping_sub(16);
        }
        4 | 5 => drop(input.splice(at..at, std::iter::repeat_n(byte, length(dice)))),
        6 => drop(input.drain(at..end)),
        7 => {
            let copied = input[at..end].to_vec();
            let to = dice.roll(input.len() + 1);
            overwrite(input, to, &copied);
        }
        8 => {
            let copied = input[at..end].to_vec();
            // Some faults show only if something is repeated very often.
            let often =
                if dice.roll(32) == 0 { target.longest / copied.len().max(1) } else { 1 + dice.roll(4) };
            drop(input.splice(at..at, copied.repeat(often.min(target.longest))));
        }
        9 => {
            let other = &dice.of(seeds).bytes;
            let from = dice.roll(other.len() + 1);
            drop(input.splice(at.., other[from..].iter().copied()));
        }
        10 if dice.roll(4) == 0 => input.truncate(at),
        10 | 11 => {
            let word = word(dice, target);
            drop(input.splice(at..at, word));
        }
        _ => {
            let word = word(dice, target);
            overwrite(input, at, &word);
        }
    }
}

fn length(dice: &mut Dice) -> usize {
    let longest = *dice.of(&[4, 16, 64, 1024]);
    1 + dice.roll(longest)
}

/// Returns a word of the target's format, or a number as text.
fn word(dice: &mut Dice, target: &Target) -> Vec<u8> {
    match dice.roll(4) {
        0 => (1_u64 << dice.roll(64)).wrapping_sub(dice.roll(2) as u64).to_string().into_bytes(),
        _ if target.words.is_empty() => vec![*dice.of(&BYTES); length(dice)],
        _ => dice.of(target.words).as_bytes().to_vec(),
    }
}

/// Returns the bytes of a number near a power of two, in any width and order.
fn number(dice: &mut Dice) -> Vec<u8> {
    let number = (1_u64 << dice.roll(64)).wrapping_add(dice.roll(3) as u64).wrapping_sub(1);
    let width = [1, 2, 4, 8][dice.roll(4)];
    let mut bytes = number.to_le_bytes()[..width].to_vec();
    if dice.roll(2) == 0 {
        bytes.reverse();
    }
    bytes
}

fn overwrite(input: &mut [u8], at: usize, bytes: &[u8]) {
    let room = &mut input[at..];
    let length = room.len().min(bytes.len());
    room[..length].copy_from_slice(&bytes[..length]);
}
