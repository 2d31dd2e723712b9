//! What `#[hopline::service]` and `#[hopline::event]` take, and what they refuse with which words.

/// One test, since both kinds of cases share the build of the library.
#[test]
fn good_services_compile_and_bad_ones_are_refused_at_the_spot() {
    let cases = trybuild::TestCases::new();
    cases.pass("tests/accepted/*.rs");
    cases.compile_fail("tests/refused/*.rs");
}
