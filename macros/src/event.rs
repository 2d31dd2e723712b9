//! Reads `#[hopline::event(...)]` on a type, and writes the implementation of `hopline::Event` for it.

use proc_macro2::{Span, TokenStream};
use quote::{quote, quote_spanned};
use syn::{Attribute, Error, Generics, Ident, Item, Lit, LitStr, Result};

use crate::options::{key, literal, major_version, read, refuse_repeats};
use crate::refusals::Refusals;

/// The longest routing key in AMQP, in bytes.
const MAX_KEY: usize = 255;

/// The type as it was written, and its implementation.
///
/// # Errors
/// Everything that is wrong with the type and the options, together.
pub(crate) fn event(options: TokenStream, tokens: TokenStream) -> Result<TokenStream> {
    let item = syn::parse2(tokens.clone())?;
    let Some((ident, generics, attrs)) = named_type(&item) else {
        let why =
            "not a type: write `#[hopline::event(key = \"...\")]` on `struct Name { ... }` or `enum Name { ... }`";
        return Err(Error::new(Span::call_site(), why));
    };
    let mut refusals = Refusals::default();
    if !generics.params.is_empty() {
        let why = "an event cannot be generic: it has one form on the wire. Write the types out";
        refusals.add(&generics.params, why);
    }
    let EventOptions { key, version } = EventOptions::parse(options, &mut refusals);
    refusals.into_result()?;
    let conditions = attrs.iter().filter(|attribute| attribute.path().is_ident("cfg"));
    // Errors in it, such as a type that serde cannot write, point at the name.
    let implementation = quote_spanned! {Span::mixed_site().located_at(ident.span())=>
        #(#conditions)*
        #[automatically_derived]
        impl ::hopline::Event for #ident {
            const KEY: &'static ::core::primitive::str = #key;
            const VERSION: ::core::primitive::u32 = #version;
        }
    };
    Ok(quote!(#tokens #implementation))
}

/// A struct or an enum. `None` for anything else.
fn named_type(item: &Item) -> Option<(&Ident, &Generics, &[Attribute])> {
    match item {
        Item::Struct(item) => Some((&item.ident, &item.generics, &item.attrs)),
        Item::Enum(item) => Some((&item.ident, &item.generics, &item.attrs)),
        _ => None,
    }
}

/// The options of `#[hopline::event(...)]`.
struct EventOptions {
    key: Option<LitStr>,
    version: u32,
}

impl EventOptions {
    fn parse(options: TokenStream, refusals: &mut Refusals) -> Self {
        const NEEDS_A_KEY: &str = "an event needs a key: write `#[hopline::event(key = \"order.created\")]`";
        let is_empty = options.is_empty();
        let options = read(options, refusals);
        refuse_repeats(&options, refusals);
        let mut this = Self { key: None, version: 1 };
        for option in &options {
            match key(option).as_str() {
                "key" => match literal(option) {
                    Some(Lit::Str(text)) => {
                        if let Err(why) = check_key(&text.value()) {
                            refusals.add(text, why);
                        }
                        this.key = Some(text.clone());
                    }
                    _ => refusals.add(option, "the key is a string: write `key = \"order.created\"`"),
                },
                "version" => this.version = major_version(option, refusals),
                other => refusals.add(
                    option.path(),
                    format!("unknown option `{other}`: an event takes `key = \"...\"` and `version = 1`"),
                ),
            }
        }
        let is_missing = !options.iter().any(|option| key(option) == "key");
        if is_missing && (is_empty || !options.is_empty()) {
            refusals.push(Error::new(Span::call_site(), NEEDS_A_KEY));
        }
        this
    }
}

/// Checks the key of an event. The library has the same rule for keys that are not known before.
///
/// # Errors
/// A sentence that says what is wrong with the key.
fn check_key(key: &str) -> std::result::Result<(), String> {
    let such_as = "write words with single dots between them, such as `order.created`";
    if key.is_empty() {
        return Err(format!("the key is empty: {such_as}"));
    }
    if key.len() > MAX_KEY {
        return Err(format!("the key is longer than {MAX_KEY} bytes: write a shorter one"));
    }
    if key.split('.').any(str::is_empty) {
        return Err(format!("the key has an empty word: {such_as}"));
    }
    match key.find(['*', '#']) {
        Some(_) => Err("the key has a wildcard in it: those are for the patterns of subscribers".to_owned()),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_words_with_single_dots_between_them() {
        for key in ["order", "order.created", "größe.neu-2", &"x".repeat(255)] {
            assert_eq!(check_key(key), Ok(()));
        }
        for wrong in ["", ".", "order.", ".order", "order..created", "order.*", "#", "or#der", &"x".repeat(256)] {
            assert!(check_key(wrong).is_err(), "{wrong}");
        }
    }
}
