//! The options of a service, in `#[hopline::service(...)]`, and of a method, in `#[rpc(...)]`.

use proc_macro2::TokenStream;
use quote::ToTokens;
use syn::ext::IdentExt;
use syn::parse::Parser;
use syn::punctuated::Punctuated;
use syn::{Attribute, Expr, Ident, Lit, LitStr, Meta, Pat, Token};

use crate::refusals::Refusals;
use crate::text::{snake_case, type_text};

/// The longest name of a service or method, in bytes. Routing keys hold several names within AMQP's 255 bytes.
const MAX_NAME: usize = 64;

/// The options of `#[hopline::service(...)]`, with the defaults for those that are not written.
pub(crate) struct ServiceOptions {
    pub(crate) name: String,
    pub(crate) version: u32,
}

impl ServiceOptions {
    pub(crate) fn parse(options: TokenStream, ident: &Ident, refusals: &mut Refusals) -> Self {
        let options = read(options, refusals);
        refuse_repeats(&options, refusals);
        let (mut name, mut version) = (None, 1);
        for option in &options {
            match key(option).as_str() {
                "name" => name = self::name("service", option, refusals),
                "version" => version = major_version(option, refusals),
                other => refusals.add(
                    option.path(),
                    format!("unknown option `{other}`: a service takes `name = \"...\"` and `version = 1`"),
                ),
            }
        }
        let name = name.map(|name| name.value()).unwrap_or_else(|| {
            let default = snake_case(&ident.unraw().to_string());
            if let Err(why) = check_name("service", &default) {
                let instead = "or set another with `#[hopline::service(name = \"...\")]`";
                refusals.add(ident, format!("{why}, {instead}"));
            }
            default
        });
        Self { name, version }
    }
}

/// The options of all `#[rpc(...)]` attributes of a method. Times are in milliseconds.
#[derive(Default)]
pub(crate) struct MethodOptions {
    pub(crate) name: Option<LitStr>,
    pub(crate) timeout_ms: Option<u64>,
    pub(crate) dedup_ms: Option<u64>,
    pub(crate) pause_ms: Option<u64>,
    pub(crate) attempts: Option<u32>,
    pub(crate) retry: Option<u32>,
    /// The method's own errors after which a call is tried again.
    pub(crate) retry_on: Option<Pat>,
    pub(crate) fork: Option<u32>,
    pub(crate) hedge: bool,
    pub(crate) fail_back: bool,
    pub(crate) cache_ms: Option<u64>,
    pub(crate) stale_ms: Option<u64>,
    pub(crate) idempotent: bool,
    pub(crate) finishes: bool,
    pub(crate) oneway: bool,
    /// Whether `stream` was written, which is refused. Other errors of the method would only follow from it, so they
    /// are not reported.
    pub(crate) stream: bool,
}

impl MethodOptions {
    pub(crate) fn parse(attrs: &[Attribute], refusals: &mut Refusals) -> Self {
        let options = rpc_options(attrs, refusals);
        let mut this = Self::default();
        for option in &options {
            match key(option).as_str() {
                "idempotent" => this.idempotent = flag(option, refusals),
                "finishes" => this.finishes = flag(option, refusals),
                "oneway" => this.oneway = flag(option, refusals),
                "attempts" => this.attempts = attempts(option, refusals),
                "retry" => this.retry = retry(option, refusals),
                "retry_on" => this.retry_on = retry_on(option, refusals),
                "fork" => this.fork = fork(option, refusals),
                "hedge" => this.hedge = flag(option, refusals),
                "fail_back" => this.fail_back = flag(option, refusals),
                "cache" => this.cache_ms = duration("cache", "5s", option, refusals),
                "stale" => this.stale_ms = duration("stale", "30s", option, refusals),
                "pause" => this.pause_ms = duration("pause", "1s", option, refusals),
                "timeout" => this.timeout_ms = duration("timeout", "2s", option, refusals),
                "dedup" => this.dedup_ms = duration("dedup", "10m", option, refusals),
                "name" => this.name = name("method", option, refusals),
                "stream" => {
                    this.stream = true;
                    refusals.add(option, "streams are not available yet: return the items together, as a `Vec`");
                }
                other => refusals.add(
                    option.path(),
                    format!(
                        "unknown option `{other}`: a method takes `idempotent`, `finishes`, `timeout = \"2s\"`, \
                         `dedup = \"10m\"`, `retry = 2`, `retry_on(Error::Locked)`, `hedge`, `fork = 2`, `fail_back`, \
                         `cache = \"5s\"`, `stale = \"30s\"`, `name = \"...\"`, `oneway`, `attempts = 8` and \
                         `pause = \"1s\"`"
                    ),
                ),
            }
        }
        for option in &options {
            match (key(option).as_str(), this.oneway) {
                ("timeout", true) => refusals.add(option, "a oneway call waits for no answer: remove `timeout`"),
                ("idempotent", true) => {
                    refusals.add(option, "a oneway call is delivered at least once in any case: remove `idempotent`")
                }
                ("finishes", true) => {
                    refusals.add(option, "a oneway call runs to its end in any case: remove `finishes`")
                }
                ("retry", true) => {
                    refusals.add(option, "the servers try a oneway call again: write `attempts = 8` instead of `retry`")
                }
                (key @ ("cache" | "stale"), true) => {
                    refusals.add(option, format!("a oneway call has no result to keep: remove `{key}`"))
                }
                (key @ ("retry_on" | "hedge" | "fork" | "fail_back"), true) => {
                    refusals.add(option, format!("a oneway call waits for no answer: remove `{key}`"))
                }
                (key @ ("retry_on" | "hedge" | "fork" | "fail_back"), false) if !this.idempotent => refusals.add(
                    option,
                    format!(
                        "a call with `{key}` may run more than once: write `idempotent` too if that does no harm, or \
                         remove `{key}`"
                    ),
                ),
                ("hedge", false) if this.fork.is_some() => refusals.add(
                    option,
                    "a call that goes to several instances at once is not hedged: remove `hedge` or `fork`",
                ),
                ("cache", false) if !this.idempotent => refusals.add(
                    option,
                    "only the result of a method that may run any number of times is kept: write `idempotent` too, or \
                     remove `cache`",
                ),
                ("stale", false) if !options.iter().any(|option| key(option) == "cache") => refusals.add(
                    option,
                    "`stale` is the time after that of `cache`: write `cache = \"5s\"` too, or remove `stale`",
                ),
                (key @ ("attempts" | "pause"), false) if !this.fail_back => refusals.add(
                    option,
                    format!("only a oneway call is tried again when it fails: remove `{key}`, or write `oneway`"),
                ),
                _ => {}
            }
        }
        this
    }
}

/// The options in all `#[rpc(...)]` attributes of a method.
fn rpc_options(attrs: &[Attribute], refusals: &mut Refusals) -> Vec<Meta> {
    let mut options = Vec::new();
    for attribute in attrs.iter().filter(|attribute| attribute.path().is_ident("rpc")) {
        match &attribute.meta {
            Meta::List(list) if !list.tokens.is_empty() => options.extend(read(list.tokens.clone(), refusals)),
            _ => refusals.add(attribute, "no options: write them as in `#[rpc(idempotent)]`, or remove it"),
        }
    }
    refuse_repeats(&options, refusals);
    options
}

pub(crate) fn read(options: TokenStream, refusals: &mut Refusals) -> Vec<Meta> {
    match Punctuated::<Meta, Token![,]>::parse_terminated.parse2(options) {
        Ok(options) => options.into_iter().collect(),
        Err(error) => {
            refusals.push(error);
            Vec::new()
        }
    }
}

pub(crate) fn refuse_repeats(options: &[Meta], refusals: &mut Refusals) {
    for (i, option) in options.iter().enumerate() {
        let key = key(option);
        if options[..i].iter().any(|earlier| self::key(earlier) == key) {
            refusals.add(option, format!("`{key}` is given twice: keep one"));
        }
    }
}

pub(crate) fn key(option: &Meta) -> String {
    type_text(option.path().to_token_stream())
}

/// The literal in `key = literal`.
pub(crate) fn literal(option: &Meta) -> Option<&Lit> {
    let mut value = &option.require_name_value().ok()?.value;
    // The compiler wraps a literal that comes through `macro_rules!` in a group.
    while let Expr::Group(group) = value {
        value = &group.expr;
    }
    match value {
        Expr::Lit(literal) => Some(&literal.lit),
        _ => None,
    }
}

/// An option that is written without a value.
fn flag(option: &Meta, refusals: &mut Refusals) -> bool {
    if option.require_path_only().is_err() {
        let key = key(option);
        refusals.add(option, format!("`{key}` has no value: write `{key}` alone"));
    }
    true
}

fn name(what: &str, option: &Meta, refusals: &mut Refusals) -> Option<LitStr> {
    let Some(Lit::Str(name)) = literal(option) else {
        refusals.add(option, format!("the {what}'s name is a string: write `name = \"...\"`"));
        return None;
    };
    if let Err(why) = check_name(what, &name.value()) {
        refusals.add(name, why);
    }
    Some(name.clone())
}

pub(crate) fn major_version(option: &Meta, refusals: &mut Refusals) -> u32 {
    whole_number(option, 1, "the version is a whole number from 1: write `version = 1`", refusals).unwrap_or(1)
}

/// A whole number that is at least `least`. `why` says what the option is and how it is written.
fn whole_number(option: &Meta, least: u32, why: &str, refusals: &mut Refusals) -> Option<u32> {
    let number = match literal(option) {
        Some(Lit::Int(number)) => number.base10_parse().ok().filter(|number| *number >= least),
        _ => None,
    };
    if number.is_none() {
        refusals.add(option, why);
    }
    number
}

fn attempts(option: &Meta, refusals: &mut Refusals) -> Option<u32> {
    let why = "the attempts are a whole number from 1, the first included: write `attempts = 8`";
    whole_number(option, 1, why, refusals)
}

fn retry(option: &Meta, refusals: &mut Refusals) -> Option<u32> {
    let why = "a retry is a whole number from 1, of further attempts: write `retry = 2`";
    whole_number(option, 1, why, refusals)
}

fn fork(option: &Meta, refusals: &mut Refusals) -> Option<u32> {
    whole_number(option, 2, "a fork is a whole number from 2, of instances: write `fork = 2`", refusals)
}

fn retry_on(option: &Meta, refusals: &mut Refusals) -> Option<Pat> {
    if let Meta::List(list) = option
        && let Ok(errors) = list.parse_args_with(Pat::parse_multi_with_leading_vert)
    {
        return Some(errors);
    }
    refusals.add(option, "write the errors as in a `match`: `retry_on(Error::Locked | Error::Busy)`");
    None
}

/// A time, in milliseconds. `key` is the name of the option, and `such_as` an example of a value for error messages.
fn duration(key: &str, such_as: &str, option: &Meta, refusals: &mut Refusals) -> Option<u64> {
    let Some(Lit::Str(text)) = literal(option) else {
        let why = format!("write the {key} as a string: a number and a unit, such as `{key} = \"{such_as}\"`");
        refusals.add(option, why);
        return None;
    };
    match milliseconds(&text.value()) {
        Some(0) => {
            let why = match key {
                "timeout" => "fails every call",
                "pause" => "tries again before anything can have changed",
                "cache" | "stale" => "keeps nothing",
                _ => "remembers nothing",
            };
            refusals.add(text, format!("a {key} of zero {why}: write a number and a unit: `500ms`, `2s`, `1m`"))
        }
        Some(milliseconds) => return Some(milliseconds),
        None => refusals.add(text, "not a duration: write a number and a unit: `500ms`, `2s`, `1m`"),
    }
    None
}

/// Reads a whole number with a unit: `500ms`, `2s` or `1m`.
fn milliseconds(text: &str) -> Option<u64> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit())?);
    let unit = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(unit)
}

/// Checks a name that becomes part of a routing key.
///
/// # Errors
/// A sentence that says what is wrong with the name.
pub(crate) fn check_name(what: &str, name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Err(format!("a {what} needs a name: write one of letters, digits, `_` and `-`"));
    }
    if name.len() > MAX_NAME {
        return Err(format!("the {what}'s name is longer than {MAX_NAME} bytes: write a shorter one"));
    }
    match name.chars().find(|c| !(c.is_ascii_alphanumeric() || matches!(c, '_' | '-'))) {
        Some(c) => Err(format!("the {what}'s name has a {c:?} in it: write only letters, digits, `_` and `-`")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_a_whole_number_and_a_unit() {
        assert_eq!(milliseconds("500ms"), Some(500));
        assert_eq!(milliseconds("2s"), Some(2_000));
        assert_eq!(milliseconds("1m"), Some(60_000));
        assert_eq!(milliseconds("0s"), Some(0));
        for wrong in ["", "2", "s", "2 s", "1.5s", "-1s", "2h", "2sec", "18446744073709551615s"] {
            assert_eq!(milliseconds(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_name_fits_between_the_dots_of_a_routing_key() {
        assert_eq!(check_name("method", "Add_2-go"), Ok(()));
        assert_eq!(check_name("method", &"x".repeat(64)), Ok(()));
        for wrong in ["", "a.b", "größe", "a b", &"x".repeat(65)] {
            assert!(check_name("method", wrong).is_err(), "{wrong}");
        }
    }
}
