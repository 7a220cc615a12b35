//! Parsers of values.

use clap::builder::{PossibleValue, StringValueParser, TypedValueParser};
use clap::{Arg, Command, Error};
use std::ffi::OsStr;
use std::path::PathBuf;
use std::time::Duration;

/// The words that a value can be. Shells complete them. The parser accepts other words, too: the code that uses the
/// value refuses these, with a better message.
#[derive(Debug, Clone)]
pub struct Words(Vec<&'static str>);

impl Words {
    pub fn new(words: impl IntoIterator<Item = &'static str>) -> Self {
        Self(words.into_iter().collect())
    }
}

impl TypedValueParser for Words {
    type Value = String;

    fn parse_ref(&self, command: &Command, arg: Option<&Arg>, value: &OsStr) -> Result<String, Error> {
        StringValueParser::new().parse_ref(command, arg, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(self.0.iter().map(PossibleValue::new)))
    }
}

/// Accepts only the ARN of a key, because an alias cannot be a resource in a policy.
pub fn key_arn(text: &str) -> Result<String, String> {
    let parts: Vec<&str> = text.splitn(6, ':').collect();
    match parts[..] {
        ["arn", partition, "kms", region, account, key]
            if partition.starts_with("aws")
                && !region.is_empty()
                && account.len() == 12
                && account.bytes().all(|b| b.is_ascii_digit())
                && key.strip_prefix("key/").is_some_and(|id| !id.is_empty()) =>
        {
            Ok(text.to_owned())
        }
        _ => Err(
            "give the ARN of a key, such as arn:aws:kms:eu-central-1:123456789012:key/1234abcd-…; `aws kms \
             describe-key --key-id ALIAS` prints the ARN of the key of an alias"
                .to_owned(),
        ),
    }
}

pub fn text_file(text: &str) -> Result<(String, PathBuf), String> {
    let parts = text.split_once('=').filter(|(path, file)| path.starts_with('/') && !file.is_empty());
    let parts = parts.ok_or("give a path in the image and a file, such as `/etc/x.conf=x.conf`")?;
    Ok((parts.0.to_owned(), parts.1.into()))
}

pub fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|_| "give a number and a unit, such as `6h` or `2days`".to_owned())
}
