//! Formatting of text that people read.

pub fn count(number: usize, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

/// Joins the first `max` items. If there are more items, the last part is `and N more`.
pub fn list_first(items: &[String], max: usize, separator: &str) -> String {
    let shown = &items[..items.len().min(max)];
    let more = items.len() - shown.len();
    let mut list = shown.join(separator);
    if more > 0 {
        list += &format!("{separator}and {more} more");
    }
    list
}

/// Removes all control characters that could control a terminal. Only tabs and newlines are not removed.
pub fn without_control_characters(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() || matches!(c, '\t' | '\n')).collect()
}

/// Returns the parts of a text that the `*`s of a pattern match, or `None` if the pattern does not match the whole
/// text. Each `*` matches as little as possible.
pub fn match_wildcards<'t>(pattern: &str, text: &'t str) -> Option<Vec<&'t str>> {
    let mut pieces = pattern.split('*');
    let mut rest = text.strip_prefix(pieces.next()?)?;
    let pieces: Vec<_> = pieces.collect();
    let Some((last, middle)) = pieces.split_last() else { return rest.is_empty().then(Vec::new) };
    let mut found = Vec::new();
    for piece in middle {
        let (before, after) = rest.split_once(piece)?;
        found.push(before);
        rest = after;
    }
    found.push(rest.strip_suffix(last)?);
    Some(found)
}

/// Formats a size in MiB or GiB.
pub fn human_size(bytes: u64) -> String {
    match bytes {
        0..0x4000_0000 => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
        _ => format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_list_ends_with_the_number_of_the_other_items() {
        let items = ["a", "b", "c"].map(str::to_owned);
        assert_eq!(list_first(&items, 3, ", "), "a, b, c");
        assert_eq!(list_first(&items, 2, ", "), "a, b, and 1 more");
        assert_eq!(list_first(&items, 1, "\n    "), "a\n    and 2 more");
        assert_eq!(list_first(&[], 1, ", "), "");
    }
}
