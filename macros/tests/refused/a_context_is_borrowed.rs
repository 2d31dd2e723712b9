#[hopline::service]
trait Demo {
    async fn put(&self, ctx: Context);
    async fn set(&self, ctx: hopline::Context);
}

fn main() {}
