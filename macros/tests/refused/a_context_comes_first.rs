#[hopline::service]
trait Demo {
    async fn put(&self, value: u8, ctx: &Context);
}

fn main() {}
