//! An event is a struct or an enum, in a module of any names, before and after its derives.
#![deny(warnings)]

mod shop {
    pub struct Event;
    pub mod hopline {}
    #[allow(non_camel_case_types)]
    pub struct u32;

    #[::hopline::event(key = "order.created", version = 4294967295)]
    #[derive(serde::Serialize, serde::Deserialize)]
    pub struct Created {
        pub id: u64,
    }

    #[derive(serde::Serialize, serde::Deserialize)]
    #[::hopline::event(key = "order")]
    pub enum Any {
        Paid,
        Shipped(String),
    }

    #[::hopline::event(key = "order.not")]
    #[cfg(any())]
    pub struct LeftOut;
}

fn key<E: hopline::Event>() -> (&'static str, u32) {
    (E::KEY, E::VERSION)
}

fn main() {
    let _ = (shop::Event, shop::u32, shop::Any::Paid, shop::Any::Shipped(String::new()));
    let shop::Created { id: _ } = shop::Created { id: 7 };
    assert_eq!(key::<shop::Created>(), ("order.created", u32::MAX));
    assert_eq!(key::<shop::Any>(), ("order", 1));
}
