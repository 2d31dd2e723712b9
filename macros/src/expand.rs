//! Writes the code for the model of a service: the trait, the server and the client.

use proc_macro2::{Span, TokenStream};
use quote::{ToTokens, format_ident, quote, quote_spanned};
use syn::ext::IdentExt;
use syn::{Attribute, Ident, ItemTrait, TraitItem, TraitItemFn, Type, Visibility, parse_quote, parse_quote_spanned};

use crate::parse::{Method, Outcome, Service};
use crate::text::type_text;
use crate::types::is_unit;

/// All generated code. Every path in it is absolute, since the user's module may have items with the same names.
pub(crate) fn service(service: &Service) -> TokenStream {
    let definition = definition(service);
    let server = server(service);
    let client = client(service);
    quote! {
        #definition
        #server
        #client
    }
}

/// The trait as written, but with functions that return `Send` futures in place of `async fn`s.
fn definition(service: &Service) -> ItemTrait {
    let mut definition = service.definition.clone();
    let functions = definition.items.iter_mut().filter_map(|item| match item {
        TraitItem::Fn(function) => Some(function),
        _ => None,
    });
    for (function, method) in functions.zip(&service.methods) {
        function.attrs.retain(|attribute| !attribute.path().is_ident("rpc"));
        with_send_future(function, method);
    }
    definition
}

/// Turns an `async fn` into a function that returns a `Send` future.
fn with_send_future(function: &mut TraitItemFn, method: &Method) {
    let output = &method.returned;
    // Errors in the generated code, such as a future that is not `Send`, point at the method.
    let at = Span::mixed_site().located_at(method.ident.span());
    function.sig.asyncness = None;
    function.sig.output = parse_quote_spanned! {at=>
        -> impl ::core::future::Future<Output = #output> + ::core::marker::Send
    };
    let Some(body) = &mut function.default else {
        return;
    };
    function.sig.generics.where_clause = Some(parse_quote!(where Self: ::core::marker::Sync));
    let statements = &body.stmts;
    *body = match &method.outcome {
        Outcome::Oneway => parse_quote_spanned!(at=> { async move { #(#statements)* } }),
        Outcome::Plain(unit) if is_unit(unit) => {
            parse_quote_spanned!(at=> { async move { #(#statements)* } })
        }
        Outcome::Plain(_) | Outcome::Fallible(..) | Outcome::FallibleOneway(_) => {
            // The `return` that never runs tells the type to the body's own `return` and `?`.
            parse_quote_spanned! {at=> {
                async move {
                    if let ::core::option::Option::Some(result) = ::core::option::Option::None::<#output> {
                        return result;
                    }
                    #[allow(clippy::diverging_sub_expression)]
                    let result: #output = { #(#statements)* };
                    #[allow(unreachable_code)]
                    result
                }
            }}
        }
    };
}

/// The type `XServer`, whose `new` makes the service.
fn server(service: &Service) -> TokenStream {
    let (name, version) = (&service.name, service.version);
    let Declared { vis, calculator, doc_name, on_type, cfg } = Declared::of(service);
    let server = format_ident!("{}Server", doc_name, span = calculator.span());
    let type_doc = format!("Serves an implementation of [`{doc_name}`].");
    let new_doc = format!("The service `{name}.v{version}`, run by `service`.");
    let methods = service.methods.iter().map(|method| served(method, calculator));
    quote_spanned! {Span::mixed_site()=>
        #[doc = #type_doc]
        #(#on_type)*
        #[derive(::core::fmt::Debug)]
        #[allow(dead_code)]
        #vis struct #server(());

        #(#cfg)*
        #[allow(dead_code, deprecated, unused_variables, clippy::all)]
        impl #server {
            #[doc = #new_doc]
            #vis fn new(
                service: impl #calculator + ::core::marker::Send + ::core::marker::Sync + 'static,
            ) -> ::hopline::Service {
                let implementation = ::std::sync::Arc::new(service);
                let service = ::hopline::Service::new(#name, #version);
                #(#methods)*
                service
            }
        }
    }
}

/// The statement that adds a method to the service.
fn served(method: &Method, calculator: &Ident) -> TokenStream {
    let (ident, wire_name, signature) = (&method.ident, &method.wire_name, signature(method));
    let cfg = carried(&method.attrs, &["cfg"]);
    let (idents, types) = (method.argument_idents(), method.argument_types());
    // A method without arguments takes `[(); 0]`, which serde writes as an empty array. It would write `()` as null.
    let (pattern, arguments) = match idents.as_slice() {
        [] => (quote!(_), quote!([(); 0])),
        idents => (quote!((#(#idents,)*)), quote!((#(#types,)*))),
    };
    let at = Span::mixed_site().located_at(ident.span());
    let context = Ident::new(if method.context { "context" } else { "_context" }, at);
    let lent_context = method.context.then(|| quote_spanned!(at=> &#context,));
    let answer = quote_spanned!(at=> #calculator::#ident(&*implementation, #lent_context #(#idents),*).await);
    let never_fails = quote_spanned!(at=> ::core::result::Result::<_, ()>::Ok(#answer));
    // The types are named with the spans where they were written, so that errors about them point there.
    let (result, returned) = match &method.outcome {
        Outcome::Fallible(result, error) => (answer, quote_spanned!(at=> #result, #error)),
        Outcome::FallibleOneway(error) => (answer, quote_spanned!(at=> (), #error)),
        // `()` stands for an error that never occurs: serde cannot write `Infallible`.
        Outcome::Plain(result) => (never_fails, quote_spanned!(at=> #result, ())),
        Outcome::Oneway => (never_fails, quote_spanned!(at=> (), ())),
    };
    let options = &method.options;
    let millis = |ms| quote_spanned!(at=> ::core::time::Duration::from_millis(#ms));
    let natures = [
        (options.oneway || options.fail_back).then(|| quote_spanned!(at=> .oneway())),
        options.idempotent.then(|| quote_spanned!(at=> .idempotent())),
        options.finishes.then(|| quote_spanned!(at=> .finishes())),
        options.dedup_ms.map(millis).map(|time| quote_spanned!(at=> .dedup(#time))),
        options.timeout_ms.map(millis).map(|time| quote_spanned!(at=> .timeout(#time))),
        options.attempts.map(|attempts| quote_spanned!(at=> .attempts(#attempts))),
        options.pause_ms.map(millis).map(|time| quote_spanned!(at=> .pause(#time))),
    ];
    let natures = natures.into_iter().flatten();
    let names = idents.iter().map(|ident| ident.unraw().to_string());
    quote_spanned! {at=>
        #(#cfg)*
        let service = service.method::<_, #returned, _, _>(
            {
                // Of two functions with one name: see `Probe`.
                #[allow(unused_imports)]
                use ::hopline::generated::Undescribed as _;
                <::hopline::generated::Probe<#arguments, #returned>>::describe(
                    ::hopline::Method::new(#wire_name).signature(#signature) #(#natures)*,
                    &[#(#names),*],
                )
            },
            {
                let implementation = ::std::sync::Arc::clone(&implementation);
                move |#context: ::hopline::Context, #pattern: #arguments| {
                    let implementation = ::std::sync::Arc::clone(&implementation);
                    async move { #result }
                }
            },
        );
    }
}

/// The type `XClient`, with a method for each of the trait's.
fn client(service: &Service) -> TokenStream {
    let (name, version) = (&service.name, service.version);
    let Declared { vis, doc_name, calculator, on_type, cfg } = Declared::of(service);
    let client = format_ident!("{}Client", doc_name, span = calculator.span());
    let type_doc = format!("Calls the service `{name}.v{version}`, as declared by [`{doc_name}`].");
    let target = format!("{name}.v{version}");
    let methods = service.methods.iter().map(|method| called(method, vis, &target));
    quote_spanned! {Span::mixed_site()=>
        #[doc = #type_doc]
        #(#on_type)*
        #[derive(::core::clone::Clone, ::core::fmt::Debug)]
        #[allow(dead_code)]
        #vis struct #client {
            client: ::hopline::Client,
        }

        #(#cfg)*
        #[allow(dead_code, deprecated, clippy::all)]
        impl #client {
            /// Makes calls through `client`.
            #vis fn new(client: &::hopline::Client) -> Self {
                Self { client: ::core::clone::Clone::clone(client) }
            }

            #(#methods)*
        }
    }
}

/// A method of the client: it returns a call of `target` that has not been made yet.
fn called(method: &Method, vis: &Visibility, target: &str) -> TokenStream {
    let (ident, wire_name) = (&method.ident, &method.wire_name);
    let at = Span::mixed_site().located_at(ident.span());
    let attrs = carried(&method.attrs, &["cfg", "doc", "deprecated", "allow"]);
    let documented = attrs.iter().any(|attribute| attribute.path().is_ident("doc"));
    let doc = (!documented).then(|| format!("Calls `{}`.", signature(method)));
    let doc = doc.map(|text| quote!(#[doc = #text]));
    let (idents, types) = (method.argument_idents(), method.argument_types());
    let arguments = match idents.as_slice() {
        [] => quote!([(); 0]),
        idents => quote_spanned!(at=> (#(#idents,)*)),
    };
    let (returned, start) = match &method.outcome {
        Outcome::Plain(result) => {
            (quote_spanned!(at=> ::hopline::Call<#result>), quote_spanned!(at=> .call::<#result>))
        }
        Outcome::Fallible(result, error) => {
            (quote_spanned!(at=> ::hopline::Call<#result, #error>), quote_spanned!(at=> .call::<#result>))
        }
        Outcome::Oneway | Outcome::FallibleOneway(_) => {
            (quote_spanned!(at=> ::hopline::Call<::hopline::Oneway>), quote_spanned!(at=> .oneway))
        }
    };
    let fails_with = match &method.outcome {
        Outcome::Fallible(_, error) => Some(quote_spanned!(at=> .fails_with::<#error>())),
        _ => None,
    };
    let options = &method.options;
    let retry_on = options
        .retry_on
        .as_ref()
        .map(|errors| quote_spanned!(at=> .retry_on(|error| ::core::matches!(error, #errors))));
    let millis = |ms| quote_spanned!(at=> ::core::time::Duration::from_millis(#ms));
    let asked = [
        options.idempotent.then(|| quote_spanned!(at=> .idempotent())),
        options.timeout_ms.map(millis).map(|time| quote_spanned!(at=> .timeout(#time))),
        options.retry.map(|retries| quote_spanned!(at=> .retry(#retries))),
        retry_on,
        options.fork.map(|instances| quote_spanned!(at=> .fork(#instances))),
        options.hedge.then(|| quote_spanned!(at=> .hedge())),
        options.fail_back.then(|| quote_spanned!(at=> .fail_back())),
        options.cache_ms.map(millis).map(|time| quote_spanned!(at=> .cache(#time))),
        options.stale_ms.map(millis).map(|time| quote_spanned!(at=> .stale(#time))),
    ];
    let asked = asked.into_iter().flatten();
    quote_spanned! {at=>
        #doc
        #(#attrs)*
        #vis fn #ident(&self, #(#idents: #types),*) -> #returned {
            self.client #start(#target, #wire_name, #arguments) #fails_with #(#asked)*
        }
    }
}

/// What the generated types have in common with the trait.
struct Declared<'a> {
    /// The trait's visibility.
    vis: &'a Visibility,
    /// The trait's name.
    calculator: &'a Ident,
    /// The trait's name without `r#`.
    doc_name: Ident,
    /// The trait's attributes that the generated types get as well.
    on_type: Vec<&'a Attribute>,
    /// The trait's `#[cfg]`s, which `impl` blocks need as well.
    cfg: Vec<&'a Attribute>,
}

impl<'a> Declared<'a> {
    fn of(service: &'a Service) -> Self {
        let definition = &service.definition;
        Self {
            vis: &definition.vis,
            calculator: &definition.ident,
            doc_name: definition.ident.unraw(),
            on_type: carried(&definition.attrs, &["cfg", "deprecated", "allow"]),
            cfg: carried(&definition.attrs, &["cfg"]),
        }
    }
}

/// The method as people read it in docs and in error messages: `add(a: i64, b: i64) -> i64`.
fn signature(method: &Method) -> String {
    let text = |ty: &Type| type_text(ty.to_token_stream());
    let arguments = method.arguments.iter();
    let arguments: Vec<_> =
        arguments.map(|argument| format!("{}: {}", argument.ident.unraw(), text(&argument.ty))).collect();
    let result = match &method.outcome {
        Outcome::Oneway | Outcome::FallibleOneway(_) => String::new(),
        Outcome::Plain(result) if is_unit(result) => String::new(),
        Outcome::Plain(result) => format!(" -> {}", text(result)),
        Outcome::Fallible(result, error) => {
            format!(" -> Result<{}, {}>", text(result), text(error))
        }
    };
    format!("{}({}){result}", method.wire_name.value(), arguments.join(", "))
}

/// The attributes with these names, for an item that is generated.
fn carried<'a>(attrs: &'a [Attribute], names: &[&str]) -> Vec<&'a Attribute> {
    let named = |attribute: &&Attribute| names.iter().any(|name| attribute.path().is_ident(name));
    attrs.iter().filter(named).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_the_method_as_it_travels() {
        let item = quote! {
            trait Demo {
                async fn put(&self, ctx: &Context, r#type: Vec<Option<u8> >, pair: (u8, u8)) -> Result<(), std::string::String>;
                #[rpc(name = "remove")]
                async fn delete(&self, key: [u8; 4]) -> HashMap<u8, u8>;
                #[rpc(oneway)]
                async fn log(&self) -> ();
            }
        };
        let service = crate::parse::service(TokenStream::new(), item).expect("a good service");
        assert_eq!((service.name.as_str(), service.version), ("demo", 1));
        let signatures: Vec<_> = service.methods.iter().map(signature).collect();
        let expected = [
            "put(type: Vec<Option<u8>>, pair: (u8, u8)) -> Result<(), std::string::String>",
            "remove(key: [u8; 4]) -> HashMap<u8, u8>",
            "log()",
        ];
        assert_eq!(signatures, expected);
    }
}
