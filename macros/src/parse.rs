//! Reads a trait into the model of a service, and reports everything that cannot be part of one.

use proc_macro2::{Span, TokenStream};
use syn::ext::IdentExt;
use syn::{
    Attribute, Error, FnArg, Ident, Item, ItemTrait, LitStr, Pat, Result, ReturnType, Signature, TraitItem,
    TraitItemFn, Type, parse_quote,
};

use crate::options::{MethodOptions, ServiceOptions, check_name};
use crate::refusals::Refusals;
use crate::types::{ContextType, as_context, is_unit, refuse_borrows, refuse_lost_options, result_arguments};

/// The longest tuple that serde reads and writes.
const MAX_ARGUMENTS: usize = 16;

/// A trait that can be served: what `expand.rs` makes code of.
pub(crate) struct Service {
    /// The trait as it was written.
    pub(crate) definition: ItemTrait,
    pub(crate) name: String,
    pub(crate) version: u32,
    /// One for each item of the trait, in the same order.
    pub(crate) methods: Vec<Method>,
}

/// One method of the trait.
pub(crate) struct Method {
    pub(crate) ident: Ident,
    /// The method's name on the wire. Its span is where the name was written, so that errors point there.
    pub(crate) wire_name: LitStr,
    pub(crate) attrs: Vec<Attribute>,
    /// Whether the first argument is a `&Context`. It is not one of `arguments`.
    pub(crate) context: bool,
    pub(crate) arguments: Vec<Argument>,
    /// The type after `->`, as written.
    pub(crate) returned: Type,
    pub(crate) outcome: Outcome,
    pub(crate) options: MethodOptions,
}

impl Method {
    pub(crate) fn argument_idents(&self) -> Vec<&Ident> {
        self.arguments.iter().map(|argument| &argument.ident).collect()
    }

    pub(crate) fn argument_types(&self) -> Vec<&Type> {
        self.arguments.iter().map(|argument| &argument.ty).collect()
    }
}

/// One argument that is sent with the call.
pub(crate) struct Argument {
    pub(crate) ident: Ident,
    pub(crate) ty: Type,
}

/// What a call of the method returns, as the type after `->` tells.
pub(crate) enum Outcome {
    /// A result; the method has no error of its own.
    Plain(Box<Type>),
    /// `Result<T, E>`: a result, or the method's own error.
    Fallible(Box<Type>, Box<Type>),
    /// A oneway method that returns nothing.
    Oneway,
    /// A oneway method that returns `Result<(), E>`. Its caller hears nothing; the server tries again after an error.
    FallibleOneway(Box<Type>),
}

/// Reads the trait in `item`.
///
/// # Errors
/// Everything that is wrong with the trait, together, so that a user can mend all of it at once.
pub(crate) fn service(options: TokenStream, item: TokenStream) -> Result<Service> {
    let definition = read_trait(item)?;
    let mut refusals = Refusals::default();
    let ServiceOptions { name, version } = ServiceOptions::parse(options, &definition.ident, &mut refusals);
    refuse_trait(&definition, &mut refusals);
    let methods = definition.items.iter().filter_map(|item| method(item, &mut refusals)).collect::<Vec<_>>();
    refuse_shared_wire_names(&methods, &mut refusals);
    refusals.into_result()?;
    Ok(Service { definition, name, version, methods })
}

/// Reads the item as a trait. An item of another kind gets an error that says so.
fn read_trait(item: TokenStream) -> Result<ItemTrait> {
    syn::parse2(item.clone()).map_err(|error| match syn::parse2::<Item>(item) {
        Ok(Item::Trait(_)) | Err(_) => error,
        Ok(_) => Error::new(
            Span::call_site(),
            "not a trait: write `#[hopline::service]` on `trait Name { ... }`, and implement that",
        ),
    })
}

fn refuse_trait(definition: &ItemTrait, refusals: &mut Refusals) {
    if let Some(unsafety) = &definition.unsafety {
        refusals.add(unsafety, "a service is not unsafe to implement: remove `unsafe`");
    }
    if let Some(auto) = &definition.auto_token {
        refusals.add(auto, "a service is implemented by hand: remove `auto`");
    }
    if !definition.generics.params.is_empty() {
        refusals.add(
            &definition.generics.params,
            "a service cannot be generic: write the types out, or declare a trait for each",
        );
    }
    if let Some(clause) = &definition.generics.where_clause {
        refusals.add(clause, "a service has no `where` clause: write supertraits as `trait Name: Supertrait`");
    }
    for attribute in definition.attrs.iter().filter(|attribute| attribute.path().is_ident("rpc")) {
        refusals.add(attribute, "`#[rpc]` goes on a method: write the trait's options in `#[hopline::service(...)]`");
    }
}

/// Refuses two methods with the same name on the wire. If both have a `#[cfg]`, perhaps only one of them is compiled,
/// so they are accepted.
fn refuse_shared_wire_names(methods: &[Method], refusals: &mut Refusals) {
    let conditional = |method: &Method| method.attrs.iter().any(|attribute| attribute.path().is_ident("cfg"));
    for (i, method) in methods.iter().enumerate() {
        let name = &method.wire_name;
        let clashes = |earlier: &Method| {
            earlier.wire_name.value() == name.value() && !(conditional(earlier) && conditional(method))
        };
        if methods[..i].iter().any(clashes) {
            let name = name.value();
            refusals.add(
                &method.wire_name,
                format!(
                    "another method is called `{name}` on the wire: write `#[rpc(name = \"...\")]` with another name"
                ),
            );
        }
    }
}

fn method(item: &TraitItem, refusals: &mut Refusals) -> Option<Method> {
    match item {
        TraitItem::Fn(function) => return function_method(function, refusals),
        TraitItem::Const(item) => refusals.add(item, "a service has no constants: declare it outside the trait"),
        TraitItem::Type(item) => {
            refusals.add(item, "a service has no associated types: write the type itself in the methods")
        }
        other => refusals.add(other, "not a method: write `async fn name(&self)`"),
    }
    None
}

/// Reads one method. Returns `None` if nothing can be made of it; the reason is then among the refusals.
fn function_method(function: &TraitItemFn, refusals: &mut Refusals) -> Option<Method> {
    let sig = &function.sig;
    let options = MethodOptions::parse(&function.attrs, refusals);
    if options.stream {
        return None;
    }
    refuse_qualifiers(sig, refusals);
    refuse_receiver(sig, refusals);
    let bare_name = sig.ident.unraw().to_string();
    if bare_name == "new" {
        refusals
            .add(&sig.ident, "`new` makes the client: rename it and keep the wire name by `#[rpc(name = \"new\")]`");
    }
    let wire_name = options.name.clone().unwrap_or_else(|| {
        if let Err(why) = check_name("method", &bare_name) {
            refusals.add(&sig.ident, format!("{why}, or set another with `#[rpc(name = \"...\")]`"));
        }
        LitStr::new(&bare_name, sig.ident.span())
    });
    let (context, arguments) = arguments(sig, refusals);
    let returned = match &sig.output {
        ReturnType::Default => parse_quote!(()),
        ReturnType::Type(_, ty) => Type::clone(ty),
    };
    Some(Method {
        ident: sig.ident.clone(),
        wire_name,
        attrs: function.attrs.clone(),
        context,
        arguments,
        outcome: outcome(&returned, &options, refusals),
        returned,
        options,
    })
}

fn refuse_qualifiers(sig: &Signature, refusals: &mut Refusals) {
    if sig.asyncness.is_none() {
        refusals.add(sig.fn_token, "a call waits for its answer: write `async fn`");
    }
    if let Some(constness) = &sig.constness {
        refusals.add(constness, "a call happens at run time: remove `const`");
    }
    if let Some(unsafety) = &sig.unsafety {
        refusals.add(unsafety, "a caller elsewhere cannot keep a safety contract: remove `unsafe`");
    }
    if let Some(abi) = &sig.abi {
        refusals.add(abi, "a call goes through the broker, not through an ABI: remove `extern`");
    }
    if !sig.generics.params.is_empty() {
        refusals.add(
            &sig.generics.params,
            "a method cannot be generic: write the types out, and owned ones in place of lifetimes",
        );
    }
    if let Some(clause) = &sig.generics.where_clause {
        refusals.add(clause, "a method has no `where` clause: remove it");
    }
    if let Some(variadic) = &sig.variadic {
        refusals.add(variadic, "the number of arguments is fixed: write a `Vec<T>`");
    }
}

fn refuse_receiver(sig: &Signature, refusals: &mut Refusals) {
    let Some(receiver) = sig.receiver() else {
        return refusals
            .add(&sig.ident, "a call needs an implementation to run it: write `&self` as the first argument");
    };
    let lifetime = receiver.reference.as_ref().and_then(|(_, lifetime)| lifetime.as_ref());
    let why = if receiver.colon_token.is_some() || lifetime.is_some() {
        "every call borrows the implementation in the same way: write `&self`"
    } else if receiver.reference.is_none() {
        "one implementation answers all calls: write `&self`"
    } else if receiver.mutability.is_some() {
        "calls run side by side: write `&self`, and put what changes behind a lock"
    } else {
        return;
    };
    refusals.add(receiver, why);
}

/// Whether the first argument is the context, and the arguments that are sent.
fn arguments(sig: &Signature, refusals: &mut Refusals) -> (bool, Vec<Argument>) {
    let typed = sig.inputs.iter().filter_map(|input| match input {
        FnArg::Typed(typed) => Some(typed),
        FnArg::Receiver(_) => None,
    });
    let (mut context, mut arguments) = (false, Vec::new());
    for (position, input) in typed.enumerate() {
        for attribute in &input.attrs {
            refusals.add(attribute, "arguments have no attributes: write it on the method");
        }
        match (as_context(&input.ty), position) {
            (Some(ContextType::Lent), 0) => {
                context = true;
                continue;
            }
            (Some(ContextType::Lent), _) => {
                refusals.add(input, "the context comes first: write it directly after `&self`");
                continue;
            }
            (Some(ContextType::Other), _) => {
                refusals.add(&input.ty, "the context is the server's and only lent: write `&Context`");
                continue;
            }
            (None, _) => {}
        }
        refuse_borrows("an argument", &input.ty, refusals);
        refuse_lost_options(&input.ty, refusals);
        match &*input.pat {
            Pat::Ident(plain) if plain.by_ref.is_none() && plain.mutability.is_none() && plain.subpat.is_none() => {
                arguments.push(Argument { ident: plain.ident.clone(), ty: Type::clone(&input.ty) });
            }
            pattern => refusals
                .add(pattern, "an argument needs a plain name: write one here, and the pattern in the implementation"),
        }
        if arguments.len() == MAX_ARGUMENTS + 1 {
            refusals.add(input, "a method has at most 16 arguments: write a struct that holds several of them");
        }
    }
    (context, arguments)
}

/// What the method returns, as far as its type's name tells.
fn outcome(returned: &Type, options: &MethodOptions, refusals: &mut Refusals) -> Outcome {
    refuse_borrows("a result", returned, refusals);
    refuse_lost_options(returned, refusals);
    if options.oneway && is_unit(returned) {
        return Outcome::Oneway;
    }
    let arguments = result_arguments(returned);
    let result = match arguments.as_deref() {
        Some([result, _]) => result,
        _ => returned,
    };
    if options.fail_back && !is_unit(result) {
        refusals.add(returned, "a call that becomes a oneway call has no answer: remove the result, or `fail_back`");
    }
    if options.retry_on.is_some() && arguments.is_none() {
        refusals.add(returned, "the method has no error of its own: write `Result<T, E>`, or remove `retry_on`");
    }
    match arguments.as_deref() {
        Some([unit, error]) if options.oneway && is_unit(unit) => Outcome::FallibleOneway(Box::new(Type::clone(error))),
        _ if options.oneway => {
            refusals.add(
                returned,
                "a oneway call has no answer: remove the result, or `oneway`; \
                 or write `Result<(), E>`, where an error asks for another attempt",
            );
            Outcome::Oneway
        }
        None => Outcome::Plain(Box::new(returned.clone())),
        Some([result, error]) => Outcome::Fallible(Box::new(Type::clone(result)), Box::new(Type::clone(error))),
        _ => {
            refusals.add(returned, "write `Result<T, E>` in full: the macro sees names, not types");
            Outcome::Plain(Box::new(returned.clone()))
        }
    }
}
