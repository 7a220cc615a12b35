//! EC2's rules for names, tags and ids, and its errors for violations.

use crate::cloud::Tags;
use crate::error::Kind;
use anyhow::{Error, Result};
use std::fmt;

/// The minimum and the maximum number of characters of an image's name.
pub const IMAGE_NAME_LENGTH: (usize, usize) = (3, 128);
/// The maximum number of characters of an image's description.
pub const MAX_DESCRIPTION: usize = 255;
/// The maximum number of tags of a resource.
pub const MAX_TAGS: usize = 50;
/// The maximum number of characters of a tag's key.
pub const MAX_TAG_KEY: usize = 128;
/// The maximum number of characters of a tag's value.
pub const MAX_TAG_VALUE: usize = 256;
/// The maximum size of a volume of type io2, in GiB. The maximum of most other types is 16 TiB. oven does not check the
/// smaller maximum, because EC2 does.
pub const MAX_VOLUME_GIB: u64 = 65536;

/// Returns whether an image's name may contain this character.
pub fn is_image_name_character(c: char) -> bool {
    c.is_ascii_alphanumeric() || "()[] ./-'@_".contains(c)
}

/// Returns whether only AWS itself may set a tag with this key.
pub fn is_reserved_tag_key(key: &str) -> bool {
    key.to_ascii_lowercase().starts_with("aws:")
}

/// Makes an error in EC2's form, `CODE: text`.
pub fn ec2_error(code: &str, text: impl fmt::Display) -> Error {
    Kind::Cloud.error(format!("{code}: {text}"))
}

/// Makes an error in EC2's form for something that does not exist.
pub fn not_found_error(code: &str, text: impl fmt::Display) -> Error {
    Kind::NotFound.error(format!("{code}: {text}"))
}

/// Checks an AMI's name. It must have 3 to 128 characters. [`is_image_name_character`] decides which characters are
/// permitted.
pub fn check_image_name(name: &str) -> Result<()> {
    let length = name.chars().count();
    let (least, most) = IMAGE_NAME_LENGTH;
    let problem = if !(least..=most).contains(&length) {
        format!("it has {length} characters")
    } else if let Some(c) = name.chars().find(|c| !is_image_name_character(*c)) {
        format!("it has a {c:?}")
    } else {
        return Ok(());
    };
    let rule = "AMI names must be between 3 and 128 characters long, and may contain letters, numbers, '(', ')', \
                '[', ']', ' ', '.', '/', '-', ''', '@' and '_'";
    Err(ec2_error("InvalidAMIName.Malformed", format!("{name:?} is not a valid AMI name: {problem}. {rule}")))
}

/// Checks an AMI's description. It must have at most 255 characters.
pub fn check_description(text: &str) -> Result<()> {
    let length = text.chars().count();
    if length <= MAX_DESCRIPTION {
        return Ok(());
    }
    let problem = format!("the description has {length} characters; at most {MAX_DESCRIPTION} are allowed");
    Err(ec2_error("InvalidParameterValue", problem))
}

/// Checks tags. There must be at most 50. A key must have 1 to 128 characters and must not begin with `aws:`. A value
/// must have at most 256 characters.
pub fn check_tags(tags: &Tags) -> Result<()> {
    if tags.len() > MAX_TAGS {
        return Err(ec2_error(
            "TagLimitExceeded",
            format!("there are {} tags; at most {MAX_TAGS} are allowed", tags.len()),
        ));
    }
    for (key, value) in tags {
        let (key_length, value_length) = (key.chars().count(), value.chars().count());
        let problem = if !(1..=MAX_TAG_KEY).contains(&key_length) {
            format!("the tag key {key:?} has {key_length} characters; 1 to {MAX_TAG_KEY} are allowed")
        } else if value_length > MAX_TAG_VALUE {
            format!(
                "the value of the tag {key:?} has {value_length} characters; at most {MAX_TAG_VALUE} are allowed"
            )
        } else if is_reserved_tag_key(key) {
            format!("the tag key {key:?} begins with 'aws:', which is reserved for internal use")
        } else {
            continue;
        };
        return Err(ec2_error("InvalidParameterValue", problem));
    }
    Ok(())
}

/// Returns whether `id` has the form of EC2's ids: the prefix, a dash, and 17 lower-case hexadecimal digits. Ids with 8
/// digits are also accepted, because EC2 used them before 2016.
pub fn is_id(prefix: &str, id: &str) -> bool {
    id.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('-')).is_some_and(|digits| {
        matches!(digits.len(), 8 | 17) && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    })
}

/// Makes a new id. Its first digit is a zero, as in EC2's ids.
pub fn new_id(prefix: &str) -> String {
    format!("{prefix}-0{}", &crate::ids::RunId::new().0[..16])
}

/// Returns whether a name matches the pattern of an EC2 filter. `*` matches any text, `?` matches any character, and
/// `\` escapes the next character.
pub fn matches_filter(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let (mut p, mut n) = (0, 0);
    // The position in the pattern after the last `*` that was reached, and the end of the text in the name that this
    // `*` matches so far. After a mismatch, this `*` matches one more character. Only the last `*` is tried again, so
    // the time never grows exponentially.
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        let width = if pattern.get(p) == Some(&'\\') && p + 1 < pattern.len() { 2 } else { 1 };
        let is_match = match (pattern.get(p), width) {
            (Some('*'), _) => {
                star = Some((p + 1, n));
                p += 1;
                continue;
            }
            (Some('?'), _) => true,
            (Some(_), width) => pattern[p + width - 1] == name[n],
            (None, _) => false,
        };
        if is_match {
            (p, n) = (p + width, n + 1);
        } else if let Some((after, taken)) = star {
            star = Some((after, taken + 1));
            (p, n) = (after, taken + 1);
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_names() {
        for good in ["abc", "web-0123456789ab", "a b/c[1](2).3'@_", &"x".repeat(128)] {
            check_image_name(good).unwrap();
        }
        for bad in ["", "ab", &"x".repeat(129), "a:b", "naïve", "a\nb", "a*b", "web#1"] {
            let error = check_image_name(bad).unwrap_err();
            assert!(error.to_string().starts_with("InvalidAMIName.Malformed: "), "{error}");
            assert_eq!(Kind::of(&error), Kind::Cloud);
        }
    }

    #[test]
    fn tags() {
        let tags = |pairs: &[(&str, &str)]| -> Tags {
            pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
        };
        check_tags(&tags(&[("k", ""), (&"é".repeat(128), &"é".repeat(256))])).unwrap();
        for bad in
            [("", "v"), (&*"k".repeat(129), "v"), ("k", &*"v".repeat(257)), ("aws:k", "v"), ("AWS:k", "v")]
        {
            assert!(
                check_tags(&tags(&[bad])).unwrap_err().to_string().starts_with("InvalidParameterValue: ")
            );
        }
        let many = |n: u32| -> Tags { (0..n).map(|i| (i.to_string(), String::new())).collect() };
        check_tags(&many(50)).unwrap();
        assert!(check_tags(&many(51)).unwrap_err().to_string().starts_with("TagLimitExceeded: "));
    }

    #[test]
    fn ids() {
        assert!(is_id("ami", &new_id("ami")) && is_id("snap", "snap-01234567"));
        assert_ne!(new_id("vol"), new_id("vol"));
        for bad in [
            "ami",
            "ami-",
            "ami-0",
            "ami-../../../../../etc",
            "ami-0123456789ABCDEF0",
            "vol-0123456789abcdef0",
        ] {
            assert!(!is_id("ami", bad), "{bad}");
        }
    }

    #[test]
    fn filters_match() {
        for (pattern, name, expected) in [
            ("debian", "debian", true),
            ("debian", "debian-12", false),
            ("debian-*", "debian-12-amd64", true),
            ("*-amd64-*", "debian-12-amd64-1", true),
            ("*-amd64", "debian-12-amd64-1", false),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("a*b*c", "a-b-b-c", true),
            ("*", "", true),
            ("**", "x", true),
            ("", "", true),
            ("", "x", false),
            ("a\\*", "a*", true),
            ("a\\*", "ab", false),
            ("a\\?c", "abc", false),
            ("Debian", "debian", false),
            ("a*", "a", true),
            ("?", "é", true),
        ] {
            assert_eq!(matches_filter(pattern, name), expected, "{pattern} {name}");
        }
        let start = std::time::Instant::now();
        assert!(!matches_filter(&"*a".repeat(60), &"a".repeat(59)));
        assert!(start.elapsed().as_secs() < 5);
    }
}
