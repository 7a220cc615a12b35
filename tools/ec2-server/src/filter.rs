//! Filters and pages of the Describe calls.

use crate::params::Params;
use crate::refusal::{Result, no};
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

/// EC2's limit for the number of values in all filters of a call.
const MOST_VALUES: usize = 200;

/// The filters of a call: `Filter.1.Name`, `Filter.1.Value.1` and so on.
#[derive(Debug, Hash)]
pub struct Filters(Vec<(String, Vec<String>)>);

/// A record to which filters apply.
pub trait Fields {
    /// Returns the values of the field with the filter's name. Returns `None` if there is no such filter.
    fn field(&self, name: &str) -> Option<Vec<String>>;
    fn tags(&self) -> &BTreeMap<String, String>;
}

impl Filters {
    pub fn take(params: &mut Params) -> Result<Self> {
        let mut filters = Vec::new();
        for mut filter in params.structures("Filter")? {
            let (name, values) = (filter.required("Name")?, filter.list("Value")?);
            filter.done()?;
            if values.is_empty() {
                no!("InvalidParameterValue", "The filter '{name}' has no value");
            }
            filters.push((name, values));
        }
        if filters.iter().map(|(_, values)| values.len()).sum::<usize>() > MOST_VALUES {
            no!(
                "FilterLimitExceeded",
                "The maximum number of filter values specified on a single call is 200"
            );
        }
        Ok(Self(filters))
    }

    /// Fails if a filter has no corresponding field in `example`.
    pub fn check(&self, example: &impl Fields) -> Result<()> {
        for (name, _) in &self.0 {
            let is_tag = name == "tag-key" || name.strip_prefix("tag:").is_some_and(|key| !key.is_empty());
            if !is_tag && example.field(name).is_none() {
                no!("InvalidParameterValue", "The filter '{name}' is invalid");
            }
        }
        Ok(())
    }

    /// Returns whether every filter has a value that matches.
    pub fn fit(&self, thing: &impl Fields) -> bool {
        self.0.iter().all(|(name, patterns)| {
            let values = match name.strip_prefix("tag:") {
                Some(key) => thing.tags().get(key).cloned().into_iter().collect(),
                None if name == "tag-key" => thing.tags().keys().cloned().collect(),
                None => thing.field(name).unwrap_or_default(),
            };
            patterns.iter().any(|pattern| values.iter().any(|value| matches(pattern, value)))
        })
    }
}

/// Matches a pattern. `*` matches any text and `?` matches one character. `\` removes the special meaning of the next
/// character.
pub fn matches(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    // `reached[i]` is true if the first `at` characters of the pattern match the first `i` characters of the text.
    let mut reached = vec![false; text.len() + 1];
    reached[0] = true;
    let mut at = 0;
    while at < pattern.len() {
        let mut next = vec![false; text.len() + 1];
        match pattern[at] {
            '*' => {
                let from = reached.iter().position(|r| *r).unwrap_or(next.len());
                next[from..].fill(true);
            }
            c => {
                let escaped = c == '\\' && at + 1 < pattern.len();
                let wanted = if escaped { pattern[at + 1] } else { c };
                at += usize::from(escaped);
                for i in 0..text.len() {
                    next[i + 1] = reached[i] && (text[i] == wanted || (c == '?' && !escaped));
                }
            }
        }
        reached = next;
        at += 1;
    }
    reached[text.len()]
}

/// The requested page of a list.
#[derive(Debug)]
pub struct Page {
    most: Option<usize>,
    start: usize,
    /// The hash of the query. A token is valid for one query.
    query: u64,
}

impl Page {
    /// Takes `MaxResults` and `NextToken`. `ids` has the requested ids. If there are any, EC2 allows no pages.
    pub fn take(params: &mut Params, ids: &[String], query: impl Hash, least: u32) -> Result<Self> {
        let (most, token) = (params.integer("MaxResults")?, params.text("NextToken"));
        if (most.is_some() || token.is_some()) && !ids.is_empty() {
            no!("InvalidParameterCombination", "The parameter maxResults cannot be used with ids");
        }
        if let Some(most) = most.filter(|most| *most < least || *most > 1000) {
            no!(
                "InvalidParameterValue",
                "Value ( {most} ) for parameter maxResults is invalid. Expecting a value between {least} and 1000."
            );
        }
        let mut hash = DefaultHasher::new();
        query.hash(&mut hash);
        let query = hash.finish();
        let start = match &token {
            None => 0,
            Some(token) => {
                match token.split_once('-').map(|(q, n)| (u64::from_str_radix(q, 16), n.parse())) {
                    Some((Ok(q), Ok(start))) if q == query => start,
                    _ => no!("InvalidParameterValue", "Unable to parse pagination token"),
                }
            }
        };
        Ok(Self { most: most.map(|n| n as usize), start, query })
    }

    /// Returns the page, and the token of the next page.
    pub fn cut<T>(&self, things: Vec<T>, short: Option<usize>) -> (Vec<T>, Option<String>) {
        let rest = things.len().saturating_sub(self.start);
        let Some(most) = self.most.map(|most| most.min(short.unwrap_or(most))) else {
            return (things.into_iter().skip(self.start).collect(), None);
        };
        let token = (rest > most).then(|| format!("{:x}-{}", self.query, self.start + most));
        (things.into_iter().skip(self.start).take(most).collect(), token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Thing(BTreeMap<String, String>);
    impl Fields for Thing {
        fn field(&self, name: &str) -> Option<Vec<String>> {
            (name == "state").then(|| vec!["available".to_owned()])
        }
        fn tags(&self) -> &BTreeMap<String, String> {
            &self.0
        }
    }

    fn filters(body: &str) -> Result<Filters> {
        Filters::take(&mut Params::parse(body.as_bytes()).unwrap())
    }

    #[test]
    fn filters_are_all_of_any_of() {
        let thing = Thing([("a:b".to_owned(), "1".to_owned())].into());
        for (body, fits) in [
            ("", true),
            ("Filter.1.Name=state&Filter.1.Value.1=pending&Filter.1.Value.2=avail*", true),
            ("Filter.1.Name=state&Filter.1.Value.1=pending", false),
            ("Filter.1.Name=tag:a:b&Filter.1.Value.1=1", true),
            ("Filter.1.Name=tag:a:b&Filter.1.Value.1=2", false),
            ("Filter.1.Name=tag:c&Filter.1.Value.1=*", false),
            ("Filter.1.Name=tag-key&Filter.1.Value.1=a:*", true),
            ("Filter.1.Name=tag-key&Filter.1.Value.1=a&Filter.2.Name=state&Filter.2.Value.1=*", false),
        ] {
            let filters = filters(body).unwrap();
            filters.check(&thing).unwrap();
            assert_eq!(filters.fit(&thing), fits, "{body}");
        }
        let code = |body: &str| filters(body).and_then(|f| f.check(&thing)).unwrap_err().code;
        assert_eq!(code("Filter.1.Name=status&Filter.1.Value.1=x"), "InvalidParameterValue");
        assert_eq!(code("Filter.1.Name=state"), "InvalidParameterValue");
        assert_eq!(code("Filter.1.Value.1=x"), "MissingParameter");
        assert_eq!(code("Filter.1.Name=state&Filter.1.Value.1=x&Filter.1.Values.1=x"), "UnknownParameter");
        let many: String = (1..=201).map(|n| format!("&Filter.1.Value.{n}=x")).collect();
        assert_eq!(code(&format!("Filter.1.Name=state{many}")), "FilterLimitExceeded");
    }

    #[test]
    fn wildcards() {
        for (pattern, text, fits) in [
            ("a", "a", true),
            ("a", "ab", false),
            ("debian-12-*", "debian-12-amd64-1", true),
            ("*-amd64", "debian-12-amd64-1", false),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("a\\*", "a*", true),
            ("a\\*", "ab", false),
            ("a\\?c", "abc", false),
            ("*", "", true),
            ("", "", true),
            ("", "a", false),
            ("A", "a", false),
        ] {
            assert_eq!(matches(pattern, text), fits, "{pattern} {text}");
        }
    }

    #[test]
    fn pages() {
        let page =
            |body: &str, query: u8| Page::take(&mut Params::parse(body.as_bytes()).unwrap(), &[], query, 5);
        let all: Vec<u8> = (0..12).collect();
        assert_eq!(page("", 1).unwrap().cut(all.clone(), Some(3)), (all.clone(), None));
        let (mut seen, mut token, mut calls) = (Vec::new(), String::new(), 0);
        loop {
            let next = if calls == 0 { String::new() } else { format!("&NextToken={token}") };
            let (some, more) = page(&format!("MaxResults=5{next}"), 1).unwrap().cut(all.clone(), None);
            (seen, calls) = ([seen, some].concat(), calls + 1);
            match more {
                Some(more) => token = more,
                None => break,
            }
        }
        assert_eq!((seen, calls), (all.clone(), 3));
        assert_eq!(
            page(&format!("MaxResults=5&NextToken={token}"), 2).unwrap_err().code,
            "InvalidParameterValue"
        );
        assert_eq!(page("MaxResults=4", 1).unwrap_err().code, "InvalidParameterValue");
        assert_eq!(page("MaxResults=1001", 1).unwrap_err().code, "InvalidParameterValue");
        assert_eq!(page("MaxResults=1000", 1).unwrap().cut(all, Some(2)).0, [0, 1]);
        let ids = Page::take(&mut Params::parse(b"MaxResults=5").unwrap(), &["x".to_owned()], 1, 5);
        assert_eq!(ids.unwrap_err().code, "InvalidParameterCombination");
    }
}
