//! A body that consists of chunks, each preceded by its length. These are HTTP's chunks, and the chunks that AWS's
//! clients sign one by one.

/// Returns a chunk's length, the start of its data, and the start of the next chunk.
fn chunk(text: &[u8], at: usize) -> Result<Option<(usize, usize, usize)>, &'static str> {
    let Some(line) = line(text, at) else { return Ok(None) };
    // A semicolon separates the length from extensions such as a signature.
    let digits = line.split(|b| *b == b';').next().unwrap_or(line);
    let length =
        std::str::from_utf8(digits).ok().and_then(|digits| usize::from_str_radix(digits.trim(), 16).ok());
    let length = length.filter(|length| *length <= u32::MAX as usize).ok_or("a chunk without a length")?;
    let start = at + line.len() + 2;
    Ok(Some((length, start, start + length + 2)))
}

fn line(text: &[u8], at: usize) -> Option<&[u8]> {
    let rest = text.get(at..)?;
    let end = rest.windows(2).position(|two| two == b"\r\n")?;
    Some(&rest[..end])
}

/// Returns the end of the chunks and of the trailers after them. Returns `None` if the end was not read yet.
pub fn end(text: &[u8]) -> Result<Option<usize>, &'static str> {
    let mut at = 0;
    loop {
        let Some((length, start, next)) = chunk(text, at)? else { return Ok(None) };
        if length > 0 {
            if text.len() < next {
                return Ok(None);
            }
            if text[next - 2..next] != *b"\r\n" {
                return Err("a chunk that is longer than it says");
            }
            at = next;
            continue;
        }
        at = start;
        // Trailers end with an empty line.
        loop {
            let Some(trailer) = line(text, at) else { return Ok(None) };
            at += trailer.len() + 2;
            if trailer.is_empty() {
                return Ok(Some(at));
            }
        }
    }
}

/// Returns the data of chunks for which [`end`] returned an end.
pub fn joined(text: &[u8]) -> Vec<u8> {
    let (mut all, mut at) = (Vec::with_capacity(text.len()), 0);
    while let Ok(Some((length, start, next))) = chunk(text, at) {
        if length == 0 {
            break;
        }
        all.extend_from_slice(&text[start..start + length]);
        at = next;
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks() {
        let plain = b"3\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\nGET";
        assert_eq!(end(plain), Ok(Some(plain.len() - 3)));
        assert_eq!(joined(plain), b"abc0123456789");
        for cut in 0..plain.len() - 3 {
            assert_eq!(end(&plain[..cut]), Ok(None), "{cut}");
        }
        let signed =
            b"3;chunk-signature=0a\r\na\r\n\r\n0;chunk-signature=0b\r\nx-amz-checksum-crc32: AAAA\r\n\r\n";
        assert_eq!(end(signed), Ok(Some(signed.len())));
        assert_eq!(joined(signed), b"a\r\n");
        assert!(end(b"x\r\n").is_err() && end(b"1\r\nabc\r\n").is_err());
        assert_eq!((end(b"0\r\n\r\n"), joined(b"0\r\n\r\n").len()), (Ok(Some(5)), 0));
    }
}
